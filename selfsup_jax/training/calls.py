"""One call of the devices: the views of a batch, then a training step; or several of them."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from selfsup_jax.data.batches import HostBatch
from selfsup_jax.data.inputs import Feed
from selfsup_jax.devices import parallel


def steps_per_call(config: ConfigDict, feed: Feed) -> int:
    """`config.steps_per_call`, or its default: 50 with data on an accelerator, else 0 (no loop).

    On the CPU, a convolution in a loop runs on one thread: the demo's step took 24 times as long.
    """
    fast_loops = jax.default_backend() != "cpu" and feed.arrays is not None
    return config.get("steps_per_call", 0) or (50 if fast_loops else 0)


def lengths(first: int, total: int, most: int, ends: Callable[[int], bool]) -> Iterator[int]:
    """The number of steps of each call after step `first`: up to `most`, to a step that `ends`."""
    step = first
    while step < total:
        count = 1
        while count < most and step + count < total and not ends(step + count):
            count += 1
        yield count
        step += count


class Call:
    """Runs one or several steps on all devices, compiled once.

    Args:
        train_step: see `loop.TrainSpec`.
        feed: how the step gets its views.
        most: the largest number of steps of a call, in a loop on the device; 0 for one step
            without a loop.
    """

    def __init__(self, train_step: Callable[..., Any], feed: Feed, most: int):
        def step(state: Any, arrays: Any, batch: Any, axis_name: str | None) -> tuple[Any, Any]:
            if feed.views is not None:
                batch = feed.views(arrays, state.step, batch)
            state, metrics = train_step(state, batch, axis_name=axis_name)
            outputs = metrics.pop("outputs", None)
            return state, (metrics, outputs)

        def several(state: Any, given: Any, *, axis_name: str | None) -> tuple[Any, Any]:
            """As `step` for the first `count` of the batches; the metrics have one row a step."""
            arrays, batches, count = given

            def body(i: jax.Array, carry: Any) -> Any:
                state, rows, _ = carry
                batch = jax.tree.map(lambda x: x[i], batches)
                state, (metrics, outputs) = step(state, arrays, batch, axis_name)
                rows = jax.tree.map(lambda all_rows, x: all_rows.at[i].set(x), rows, metrics)
                return state, rows, outputs

            one = jax.tree.map(lambda x: x[0], batches)
            # A loop with a dynamic count compiles the same body for any number of steps.
            shapes = jax.eval_shape(lambda: step(state, arrays, one, axis_name)[1])
            metrics, outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            rows = jax.tree.map(lambda x: jnp.ones((most,), x.dtype), metrics)
            state, rows, outputs = lax.fori_loop(0, count, body, (state, rows, outputs))
            return state, (rows, outputs)

        def single(state: Any, given: Any, *, axis_name: str | None) -> tuple[Any, Any]:
            arrays, batch, _ = given
            state, (metrics, outputs) = step(state, arrays, batch, axis_name)
            return state, (jax.tree.map(lambda x: x[None], metrics), outputs)

        self._most = most
        self._arrays = feed.arrays
        if feed.arrays is not None:
            self._arrays = parallel.replicate(lambda x: x, feed.arrays)
        self._run = parallel.step_over_devices(several if most else single)

    def __call__(self, state: Any, batches: list[HostBatch]) -> tuple[Any, Any, Any]:
        """Runs a step on each batch; the state is donated.

        Returns:
            The replicated state, metrics `[devices, steps]` and the last step's outputs.
        """
        state, (metrics, outputs) = self._run(state, self._given(batches))
        return state, metrics, outputs

    def compile(self, state: Any, batches: list[HostBatch]) -> Any:
        """Compiles the program for such arguments, and runs nothing."""
        return self._run.lower(state, self._given(batches)).compile()  # type: ignore[attr-defined]

    def _given(self, batches: list[HostBatch]) -> Any:
        count = np.full(jax.local_device_count(), len(batches), np.int32)
        if self._most:
            padded = batches + batches[-1:] * (self._most - len(batches))
            sharded = [parallel.shard(batch) for batch in padded]
            return self._arrays, jax.tree.map(lambda *x: np.stack(x, axis=1), *sharded), count
        (only,) = batches
        return self._arrays, parallel.shard(only), count


class Ahead:
    """Fetches batches for the devices, two calls ahead of them, and measures how long these wait.

    With more calls ahead, their batches would fill the devices' memory.

    Args:
        batches: of this host.
        from_host: False if the batches are only row numbers: nothing is limited or measured then.
    """

    def __init__(self, batches: Iterator[HostBatch], from_host: bool):
        self._batches = batches
        self._running: collections.deque[Any] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "ahead") if from_host else None
        self._waited = 0.0

    def fetch(self, count: int) -> list[HostBatch]:
        """The next batches, once the devices have at most one call left."""
        while len(self._running) > 1:
            self._running.popleft().result()
        begin = time.perf_counter()
        batches = list(itertools.islice(self._batches, count))
        if self._running and self._running[-1].done():
            self._waited += time.perf_counter() - max(begin, self._running[-1].result())
        return batches

    def add(self, metrics: Any) -> None:
        """Notes a call, by what it returns."""
        if self._thread:
            self._running.append(self._thread.submit(_time_when_ready, metrics))

    def waited(self) -> float | None:
        """Seconds in which the devices had nothing to do since the last question."""
        waited, self._waited = self._waited, 0.0
        return waited if self._thread else None

    def close(self) -> None:
        """Ends the thread."""
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _time_when_ready(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()
