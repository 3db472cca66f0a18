"""The only training loop: steps, logs, checkpoints, signals; what is trained is its caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax.devices import hosts, parallel, process
from selfsup_jax.run import nan_guard, progress, signals
from selfsup_jax.run.checkpoint import Checkpoints
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import say
from selfsup_jax.state import Outputs, TrainState


class Watcher(Protocol):
    """What looks at a run as it goes: `monitor.Monitor`."""

    def diagnose(  # noqa: D102
        self, outputs: Outputs, state: TrainState, batch: dict[str, np.ndarray]
    ) -> dict[str, float]: ...
    def knn(self, step: int, state: TrainState) -> dict[str, float]: ...  # noqa: D102
    def judge(self) -> None: ...  # noqa: D102
    def draw(  # noqa: D102
        self, step: int, state: TrainState, batch: dict[str, np.ndarray] | None
    ) -> None: ...


class Work(NamedTuple):
    """A training that is to be done.

    Attributes:
        config: of which the loop reads `log_every_steps`, `checkpoint_every_steps`,
            `keep_every_steps` and, where they are there, the sections `monitor` and `profile`.
        train_step: `(state, batch, *, axis_name) -> (state, metrics)`; among the metrics are
            "finite" and, where there is a watcher, "outputs".
        batches: this host's, from the first step to be done on; each has "name".
        total_steps: of the whole training.
        workdir: its directory.
        checkpoints: in it.
        meta: what the checkpoint of a step says of itself.
        started: when the process began, by `time.perf_counter`.
    """

    config: ConfigDict
    train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
    batches: Iterator[dict[str, np.ndarray]]
    total_steps: int
    workdir: str
    checkpoints: Checkpoints
    meta: Callable[[int], dict[str, Any]]
    started: float


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    diagnose: bool
    knn: bool
    draw: bool
    save: bool


def _due(config: ConfigDict, step: int, last: bool) -> Due:
    def every(interval: int) -> bool:
        return interval > 0 and (last or step % interval == 0)

    watch = config.get("monitor", {})
    due = Due(
        log=every(config.log_every_steps),
        diagnose=every(watch.get("diagnostics_every_steps", 0)),
        knn=every(watch.get("knn_every_steps", 0)),
        draw=every(watch.get("plots_every_steps", 0)),
        save=every(config.checkpoint_every_steps) or every(config.keep_every_steps),
    )
    return due._replace(log=due.log or due.diagnose or due.knn)


def train(
    work: Work,
    state: TrainState,
    first_step: int,
    recorder: Recorder,
    line: progress.Progress,
    watcher: Watcher | None = None,
) -> TrainState:
    """Steps from `first_step` to the last.

    Args:
        work: see `Work`; its config has no section `monitor` without a watcher.
        state: replicated, of step `first_step`.
        first_step: steps done before.
        recorder: takes what is logged.
        line: shows it.
        watcher: looks at the run every so many steps.

    Returns:
        The state after the last step, which is saved.

    Raises:
        UserError: a loss or gradient that is not finite; a disk that takes no more.
        Stopped: after SIGTERM or Ctrl-C, once the step just done is saved.
    """
    config, checkpoints = work.config, work.checkpoints
    step_fn = parallel.step_over_devices(work.train_step)
    watch = nan_guard.NanGuard(work.workdir)
    profile = _profiler(work)
    hosts.reached_preemption(first_step)  # so that the hosts agree on a step after this one
    postponed = False
    with signals.StopSignals() as stop_signals:
        for step in range(first_step + 1, work.total_steps + 1):
            batch = next(work.batches)
            names = batch.pop("name")
            state, metrics = step_fn(state, parallel.shard(batch))
            checkpoints.write()  # what was taken after the step before: the device is at work now
            outputs = metrics.pop("outputs", None)
            watch.add(step, metrics, names)
            profile(step)
            if step == first_step + 1:
                jax.block_until_ready(state.step)
                stop_signals.catch()
                say(f"first step done {time.perf_counter() - work.started:.1f} s after the start")
                line.restart(step)
            elif step == first_step + 12:
                watch.drain()
                say(line.expectation(step))

            due = _due(config, step, last=step == work.total_steps)
            if due.log:
                watch.drain()
                values = {k: float(v) for k, v in parallel.unreplicate(metrics).items()}
                del values["finite"]
                if watcher and due.diagnose:
                    values |= watcher.diagnose(outputs, state, batch)
                with line.pause():
                    values |= watcher.knn(step, state) if watcher and due.knn else {}
                rate = line.show(step, values)
                timings = {"images_per_second": rate} if rate else {}
                recorder.write(step, values, timings | process.device_memory())
                if watcher:
                    watcher.judge()
            with line.pause():
                stop = stop_signals.received(step)
                must = stop or step == work.total_steps or checkpoints.keeps(step)
                if must or due.save or postponed:
                    # Waiting for the disk would hold the step up; a little later does as well.
                    postponed = not must and checkpoints.busy
                    if not postponed:
                        watch.drain()
                        recorder.flush()
                        checkpoints.take(state, work.meta(step))
                if stop:
                    break
                if watcher and due.draw:  # after what it must not lose
                    watcher.draw(step, state, batch)
        checkpoints.write()
        checkpoints.wait()
        stop = stop or stop_signals.pending()
        if stop:
            line.close()
            raise signals.stopped(stop, step, work.workdir)
    return state


def _profiler(work: Work) -> Callable[[int], Any]:
    if "profile" not in work.config:
        return lambda step: None
    settings = work.config.profile
    return process.profiler(work.workdir, settings.first_step, settings.num_steps)
