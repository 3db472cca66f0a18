"""The only training loop, used by pretraining and by the jobs that train."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax.data.inputs import Feed
from selfsup_jax.devices import compiled, hosts, parallel, process
from selfsup_jax.durations import Intervals, intervals
from selfsup_jax.run import nan_guard, signals
from selfsup_jax.run.checkpoint import Checkpoints
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import Progress, log
from selfsup_jax.run.wandb_writer import WandbWriter
from selfsup_jax.state import TrainState
from selfsup_jax.training import calls

if TYPE_CHECKING:
    from selfsup_jax.training.monitor import Monitor


class TrainSpec(NamedTuple):
    """The specification of a training, for `fit`.

    Attributes:
        config: the loop reads `seed`, `batch_size`, `log_every_steps`, `checkpoint_every_steps`,
            `keep_every_steps` and, if they exist, the sections `monitor` and `profile`.
        init_state: `rng -> TrainState`, the state before the first step.
        train_step: `(state, batch, *, axis_name) -> (state, metrics)`; the metrics contain
            "finite" and, if there is a monitor, "outputs".
        batches: step -> this host's batches after that step; each has "name".
        feed: how the step gets its views from a batch.
        total_steps: number of steps of the whole training.
        workdir: the directory of the training.
        checkpoints: those of the workdir.
        meta: step -> the `meta` of its checkpoint.
        announce: called once with the state from which the training starts.
        started: start time of the process, from `time.perf_counter`.
        monitor: creates the monitor, also from the state that was drawn at random; None for a
            training without one.
        begin: changes the first state of a new training, as `config.init_from` asks.
    """

    config: ConfigDict
    init_state: Callable[[jax.Array], TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    total_steps: int
    workdir: str
    checkpoints: Checkpoints
    meta: Callable[[int], dict[str, Any]]
    announce: Callable[[TrainState], None]
    started: float
    monitor: Callable[[Recorder, Progress, TrainState], Any] | None = None
    feed: Feed = Feed()
    begin: Callable[[TrainState], TrainState] = lambda state: state


class Trained(NamedTuple):
    """What `fit` returns.

    Attributes:
        state: the state after the last step, which is saved; host arrays.
        initial: the randomly drawn state, before `begin`; host arrays.
        monitor: the monitor of the training, or None.
        images_per_second: 0 if no step was left to train.
        history: see `Recorder`.
    """

    state: TrainState
    initial: TrainState
    monitor: Any
    images_per_second: float
    history: dict[str, tuple[list[int], list[float]]]


def fit(spec: TrainSpec) -> Trained:
    """Trains to the last step; resumes from the newest checkpoint if there is one.

    Raises:
        UserError: a loss or gradient is not finite, or the disk is full.
        Stopped: after SIGTERM or Ctrl-C, once the current step is saved.
    """
    rng = jax.random.PRNGKey(spec.config.seed)
    initial = _timed("the first state", lambda: jax.device_get(spec.init_state(rng)))
    fresh = spec.checkpoints.latest_step is None
    latest = spec.begin(initial) if fresh else spec.checkpoints.restore(initial)
    first_step = int(latest.step)
    spec.announce(latest)
    if first_step:
        log(f"resuming from step {first_step:,} in {spec.workdir}")
    recorder = _recorder(spec, first_step)
    knn_k = spec.config.get("eval", {}).get("knn_k")
    progress = Progress(spec.total_steps, first_step, spec.config.batch_size, knn_k)
    try:
        monitor = spec.monitor(recorder, progress, initial) if spec.monitor else None
        state = parallel.replicate(lambda s: s, latest)
        if first_step < spec.total_steps:
            state = train(spec, state, first_step, recorder, progress, monitor)
        elif monitor and spec.config.monitor.plots_every_steps:
            # An earlier process may have stopped after the last save, before the plots.
            monitor.draw(first_step, state, batch=None)
    finally:
        progress.close()
        recorder.close()
    rate = progress.images_per_second
    return Trained(parallel.unreplicate(state), initial, monitor, rate, recorder.history)


def _recorder(spec: TrainSpec, first_step: int) -> Recorder:
    every = intervals(spec.config, spec.total_steps).log
    config, writers = json.loads(spec.config.to_json()), []
    if config.get("wandb", {}).get("project") and hosts.is_writer():
        writers.append(WandbWriter(spec.config.wandb, spec.workdir, config))
    return Recorder(spec.workdir, first_step, every, config, writers)


def _timed(what: str, make: Callable[[], Any]) -> Any:
    """The result of `make`, which compiles; logs that before, and how long it took after."""
    log(f"compiling {what} ...")
    made, timed = compiled.timed(make)
    log(f"compiled in {timed.seconds:.1f} s" + " (kept from before)" * bool(timed.found))
    return made


class Schedule(NamedTuple):
    """The actions after a step."""

    log: bool
    diagnose: bool
    knn: bool
    draw: bool
    save: bool


def schedule(config: ConfigDict, intervals: Intervals, step: int, last: bool) -> Schedule:
    """The actions that the intervals require after `step`; the config has those of checkpoints."""

    def every(interval: int) -> bool:
        return interval > 0 and (last or step % interval == 0)

    due = Schedule(
        log=every(intervals.log),
        diagnose=every(intervals.diagnostics),
        knn=every(intervals.knn) or step == intervals.first_knn,
        draw=every(intervals.plots) or step == intervals.first_plots,
        save=every(config.checkpoint_every_steps) or every(config.keep_every_steps),
    )
    return due._replace(log=due.log or due.diagnose or due.knn)


def train(
    spec: TrainSpec,
    state: TrainState,
    first_step: int,
    recorder: Recorder,
    progress: Progress,
    monitor: Monitor | None = None,
) -> TrainState:
    """Runs the steps after `first_step`; raises as `fit`.

    Args:
        spec: see `TrainSpec`; without a monitor, its config has no section `monitor`.
        state: the replicated state of step `first_step`.
        first_step: number of steps done before.
        recorder: records the metrics.
        progress: shows the metrics.
        monitor: measures and plots the run every few steps.

    Returns:
        The state after the last step, which is saved.
    """
    config, checkpoints = spec.config, spec.checkpoints
    most = calls.steps_per_call(config, spec.feed)
    call = calls.Call(spec.train_step, spec.feed, most)
    guard = nan_guard.NanGuard(spec.workdir)
    profile = _profiler(spec)
    ahead = calls.Ahead(spec.batches(first_step), from_host=spec.feed.arrays is None)
    hosts.at_step(first_step)
    hosts.reached_preemption(first_step)  # so that the hosts agree on a later step
    postponed = announced = False
    due_at = functools.partial(schedule, config, intervals(config, spec.total_steps))
    ends = functools.partial(_ends_call, spec, due_at, first_step)
    step = first_step
    with signals.StopSignals() as stop_signals, contextlib.closing(ahead):
        for count in calls.lengths(first_step, spec.total_steps, most, ends):
            given = ahead.fetch(count)
            names = [batch.pop("name") for batch in given]
            hosts.has_batch()
            run = functools.partial(call, state, given)
            state, metrics, outputs = run() if step > first_step else _timed("the step", run)
            del run  # the state in it is donated
            ahead.add(metrics)
            checkpoints.write()  # of the previous call, while the device computes this one
            guard.add(step + 1, metrics, names)
            step, batch = step + count, given[-1]
            hosts.at_step(step)
            profile(step)
            if step == first_step + 1:
                jax.block_until_ready(state.step)
                stop_signals.catch()
                log(f"first step done {time.perf_counter() - spec.started:.1f} s after the start")
                progress.restart(step)
            elif not announced and step >= first_step + 12:
                announced = True
                guard.drain()
                log(progress.expectation(step))

            due = due_at(step, last=step == spec.total_steps)
            if due.log:
                guard.drain()
                rows = parallel.unreplicate(metrics)
                values = {k: float(v[count - 1]) for k, v in rows.items()}
                del values["finite"]
                if monitor and due.diagnose:
                    values |= monitor.diagnose(outputs, state, batch)
                with progress.pause():
                    values |= monitor.knn(step, state) if monitor and due.knn else {}
                timings = progress.show(step, values, ahead.waited())
                recorder.write(step, values, timings | process.device_memory())
                if monitor:
                    monitor.judge()
            with progress.pause():
                stop = stop_signals.received(step)
                must_save = stop or step == spec.total_steps or checkpoints.keeps(step)
                if must_save or due.save or postponed:
                    # Save a little later rather than delay the next step by waiting for the disk.
                    postponed = not must_save and checkpoints.busy
                    if not postponed:
                        guard.drain()
                        recorder.flush()
                        checkpoints.take(state, spec.meta(step))
                if stop:
                    break
                if monitor and due.draw:  # after saving
                    monitor.draw(step, state, batch)
        checkpoints.write()
        checkpoints.wait()
        stop = stop or stop_signals.pending()
        if stop:
            progress.close()
            raise signals.stopped(stop, step, spec.workdir)
    return state


def _ends_call(
    spec: TrainSpec, due_at: Callable[..., Schedule], first_step: int, step: int
) -> bool:
    """Whether the host has something to do after this step, so that a call must end with it."""
    config = spec.config
    profile = config.get("profile", {"first_step": 0, "num_steps": 0})
    begin = profile["first_step"]
    return (
        step == first_step + 1  # its time is announced
        or any(due_at(step, last=False))
        or spec.checkpoints.keeps(step)
        or (begin > 0 and begin - 1 <= step <= begin + profile["num_steps"])
    )


def _profiler(spec: TrainSpec) -> Callable[[int], Any]:
    if "profile" not in spec.config:
        return lambda step: None
    settings = spec.config.profile
    return process.profiler(spec.workdir, settings.first_step, settings.num_steps)
