"""Stops a run at the first step whose loss or gradients are not finite."""

from __future__ import annotations

import collections
import os
from typing import Any

import jax
import numpy as np

from selfsup_jax.devices import parallel
from selfsup_jax.errors import NotFinite
from selfsup_jax.run.files import write_json


class NanGuard:
    """Finds the first step at which the loss or a gradient is not finite.

    The steps of a call are checked `lag` calls later, when their values are ready: with an
    immediate check, the device would have to wait for the host.
    """

    def __init__(self, workdir: str, lag: int = 2):
        self._workdir = workdir
        self._lag = lag
        self._waiting: collections.deque = collections.deque()

    def add(self, step: int, metrics: dict[str, Any], names: list[np.ndarray]) -> None:
        """Adds the steps of a call.

        Args:
            step: the first of them.
            metrics: `[devices, steps]` each, still on the devices; further rows are ignored.
            names: for each step, the names of its images on this host.

        Raises:
            NotFinite: the loss or a gradient of an earlier step is not finite.
        """
        finite = metrics["finite"].addressable_shards[0].data
        finite.copy_to_host_async()
        self._waiting.append((step, finite, metrics, names))
        self._check(self._lag)

    def drain(self) -> None:
        """Checks all steps added so far; raises as `add` does."""
        self._check(0)

    def _check(self, lag: int) -> None:
        while len(self._waiting) > lag:
            step, finite, metrics, names = self._waiting.popleft()
            broken = np.flatnonzero(np.asarray(finite)[0, : len(names)] == 0)
            if len(broken):
                row = int(broken[0])
                values = {k: float(v[row]) for k, v in parallel.unreplicate(metrics).items()}
                self._stop(step + row, values, names[row])

    def _stop(self, step: int, values: dict[str, float], names: np.ndarray) -> None:
        broken = sorted(k for k, v in values.items() if k != "finite" and not np.isfinite(v))
        what = ", ".join(f"{name} {values[name]}" for name in broken)
        suffix = "" if jax.process_count() == 1 else f"_host{jax.process_index()}"
        path = os.path.join(self._workdir, f"non_finite{suffix}.json")
        report = {
            "step": step,
            "non_finite": broken,
            "metrics": {k: v if np.isfinite(v) else str(v) for k, v in values.items()},
            "images": [str(name) for name in names],
        }
        write_json(path, report)
        raise NotFinite(
            f"step {step} is not finite: {what}; its images are named in {path}. "
            "The last good checkpoint stays; a lower config.optimizer.learning_rate or a longer "
            "warm-up may help, in another --workdir"
        )
