"""Follow mode: a job evaluates each checkpoint of a run once, while the run is training."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.config import check_values
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.jobs import runner
from selfsup_jax.run import owner, workdir
from selfsup_jax.run.checkpoint_files import Damaged
from selfsup_jax.run.files import read_json, write_json
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import log
from selfsup_jax.viz.titles import measures

_OF_THE_STEP = ("data_info.step", "data_info.checkpoint")


def follow(config: ConfigDict, directory: str, prepare: runner.Prepare) -> dict[str, Any]:
    """Evaluates every checkpoint of a run, the oldest first, until the run has ended.

    Each checkpoint has its own folder, `step_00001000`, with all files of the job; the newest
    results are also in `directory`. The measures are written to the run's TensorBoard logs, below
    `RUN/evaluation/`. After a kill, the same command resumes and skips finished checkpoints.

    Args:
        config: of the job; its `checkpoint` is a run's workdir.
        directory: the job's workdir.
        prepare: of the job.

    Returns:
        The results of the newest checkpoint.

    Raises:
        UserError: as `runner.run`; also if the checkpoint is not a run's workdir, or without a new
            checkpoint for `config.follow_patience_hours`.
    """
    run = paths.absolute(os.path.expanduser(config.checkpoint))
    paths.check(run, "config.checkpoint")
    exported = paths.exists(os.path.join(run, encoder.ABOUT))
    inside = "checkpoints" in run.split(os.sep)[-2:]
    if not config.checkpoint or not paths.isdir(run) or exported or inside:
        raise bad_field("checkpoint", config.checkpoint, "must be a run's workdir, to follow it")
    workdir.check_path(directory)
    owner.check(directory, config.job)
    with workdir.locked(directory), _MeasureLog(run, directory) as measure_log:
        resolved: ConfigDict | None = None
        for frozen in _checkpoints(config, run, directory):
            if resolved is None:
                resolved = runner.resolve_config(config, frozen)
                check_values(resolved)
                job = prepare(resolved, frozen)
            description = runner.describe_job(resolved, job, frozen)
            runner.check_same(description, directory, free=_OF_THE_STEP)
            baseline = os.path.join(directory, "random_init")
            folder = step_folder(directory, frozen.step)
            with runner.begun(description, directory):
                results = runner.evaluate(resolved, job, frozen, folder, baseline)
            _write_newest(directory, results)
            measure_log.record(frozen.step, results)
        done = hosts.of_first("the evaluated steps", done_steps(directory))
        if not done:
            raise bad_field("checkpoint", config.checkpoint, "none of its checkpoints is whole")
        newest = runner.saved_results(step_folder(directory, done[-1]))
        assert newest is not None
        _write_newest(directory, newest)  # missing if killed just before
        left = ", ".join(str(s) for s in encoder.checkpoint_steps(run) if s not in done)
        note = f"; not that of step {left}" if left else ""
        log(f"{run} has ended; its {len(done)} checkpoints are evaluated{note}")
        return newest


def _write_newest(directory: str, results: dict[str, Any]) -> None:
    if hosts.is_writer():
        write_json(os.path.join(directory, runner.RESULTS), results)


def step_folder(directory: str, step: int) -> str:
    """The folder for the evaluation of a step's checkpoint."""
    return os.path.join(directory, f"step_{step:08d}")


def done_steps(directory: str) -> list[int]:
    """The steps whose evaluation is complete, in ascending order."""
    files = paths.glob(directory, f"step_*/{runner.RESULTS}")
    names = (path.split(os.sep)[-2].removeprefix("step_") for path in files)
    return sorted(int(name) for name in names if name.isdecimal())


def has_ended(run: str) -> bool:
    """Whether a run has written results for its newest checkpoint and was not resumed since."""
    results, config = (os.path.join(run, name) for name in (runner.RESULTS, "config.json"))
    steps = encoder.checkpoint_steps(run)
    try:
        # A process that resumes a run first rewrites its config.
        if not steps or paths.getmtime(results) < paths.getmtime(config):
            return False
        last = read_json(results).get("steps", 0)
        if not isinstance(last, int):
            raise UserError(f"{results}: steps={last!r} is not a number; move the file away")
        return last <= steps[-1]
    except OSError:
        return False


def _checkpoints(config: ConfigDict, run: str, directory: str) -> Iterator[FrozenEncoder]:
    """Yields each checkpoint that is not evaluated yet; waits for more until the run has ended.

    The first host looks for them, and all take the same one, if all of them can read it. A damaged
    one is named and left out; the same command tries it again.
    """
    looking = _steps(config, run, directory) if hosts.is_writer() else iter(())
    while (step := hosts.of_first("the next checkpoint", next(looking, None))) is not None:
        frozen, failure = _load_if_there(run, step, config.follow_poll_seconds)
        failures = [told for told in hosts.of_all("could read it", failure) if told]
        if frozen is not None and not failures:
            yield frozen
        else:
            log(failures[0])


def _steps(config: ConfigDict, run: str, directory: str) -> Iterator[int]:
    """Yields the steps of checkpoints that are to be evaluated, see `_checkpoints`."""
    patience = 3600 * config.follow_patience_hours
    last_new, waiting = time.monotonic(), False
    left_out: set[int] = set()
    while True:
        ended = has_ended(run)  # checked first: a run saves its last checkpoint before it ends
        steps = encoder.checkpoint_steps(run)
        new = sorted(set(steps) - set(done_steps(directory)) - left_out)
        yield from new
        left_out |= set(new) - set(done_steps(directory))
        if new:
            last_new, waiting = time.monotonic(), False
            continue
        if ended:
            if not steps:
                raise bad_field("checkpoint", config.checkpoint, "the run has no checkpoint")
            return
        if time.monotonic() - last_new > patience:
            raise UserError(
                f"config.follow_patience_hours={config.follow_patience_hours:g}: no new checkpoint "
                f"in {run} within that time, and the run has not ended"
            )
        if not waiting:
            log(f"waiting for the next checkpoint of {run}")
            waiting = True
        time.sleep(config.follow_poll_seconds)


def _load_if_there(run: str, step: int, patience: float) -> tuple[FrozenEncoder | None, str]:
    """(the checkpoint of a step, ""); or (None, why), if it was removed or is damaged."""
    try:
        return encoder.load(run, step), ""
    except Damaged as e:
        return None, f"{e}; it is left out"
    except UserError:
        if step in encoder.checkpoint_steps(run):
            time.sleep(patience)  # the run may be removing it
            if step in encoder.checkpoint_steps(run):
                raise
    return None, f"the checkpoint of step {step} was removed before it could be read"


class _MeasureLog:
    """Writes the measures of all steps to the run's TensorBoard logs, each step once."""

    def __init__(self, run: str, directory: str):
        self._directory = directory
        here = paths.real(directory)
        mark = hashlib.md5(here.encode()).hexdigest()[:6]  # two jobs may have the same folder name
        self._folder = os.path.join(run, "evaluation", f"{os.path.basename(here)}-{mark}")
        self._recorder: Recorder | None = None

    def __enter__(self) -> _MeasureLog:
        if not hosts.is_writer():
            return self
        done = done_steps(self._directory)
        try:
            paths.makedirs(self._folder)
            self._recorder = Recorder(self._folder, done[-1] if done else 0)
        except OSError as e:  # for example, another user owns the run
            self._folder = self._directory
            log(f"TensorBoard's points go to {self._folder}: {e.strerror or e}")
            self._recorder = Recorder(self._folder, done[-1] if done else 0)
        recorded = {step for steps, _ in self._recorder.history.values() for step in steps}
        for step in sorted(set(done) - recorded):  # killed before they were recorded
            path = os.path.join(step_folder(self._directory, step), runner.RESULTS)
            self.record(step, read_json(path))
        return self

    def record(self, step: int, results: dict[str, Any]) -> None:
        """Writes the measures of a step."""
        values = measures(results)
        if values and self._recorder is not None:  # a job such as `embed` has no measures
            self._recorder.write(step, values, {})
            self._recorder.flush()

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            with contextlib.suppress(OSError):
                self._recorder.close()
