"""Watch mode: a job follows a run and evaluates each of its checkpoints once."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from selfsup_jax import config as config_lib
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder
from selfsup_jax.evaluation.encoder import Frozen
from selfsup_jax.jobs import runner
from selfsup_jax.run import workdir
from selfsup_jax.run.files import write_json
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import say

_OF_THE_STEP = ("found.step", "found.checkpoint")


def follow(config: ConfigDict, directory: str, prepare: runner.Prepare) -> dict[str, Any]:
    """Evaluates every checkpoint of a run, the oldest first, until the run has ended.

    Each has a folder of its own, `step_00001000`, with all that the job leaves; the newest's
    results are also in `directory`. The measures go to the run's TensorBoard, below
    `RUN/evaluation/`. After a kill the same command goes on: what is done isn't done again.

    Args:
        config: the job's; its `checkpoint` is a run's workdir.
        directory: the job's workdir.
        prepare: the job's.

    Returns:
        The newest checkpoint's results.

    Raises:
        UserError: as `runner.run`; the checkpoint is no run's workdir, several hosts, or no new
            checkpoint within `config.watch_patience_hours`.
    """
    run = os.path.abspath(os.path.expanduser(config.checkpoint))
    exported = os.path.exists(os.path.join(run, encoder.ABOUT))
    if not config.checkpoint or not os.path.isdir(run) or exported or _inside_a_run(run):
        raise bad_field("checkpoint", config.checkpoint, "must be a run's workdir, to be watched")
    if jax.process_count() > 1:
        raise bad_field("watch", True, "is for one host")
    with workdir.locked(directory), _Log(run, directory) as log:
        resolved: ConfigDict | None = None
        for frozen in _checkpoints(config, run, directory):
            if resolved is None:
                resolved = runner.adopt(config, frozen)
                config_lib.check_values(resolved)
                prepared = prepare(resolved, frozen)
            identity = runner.identity_of(resolved, prepared, frozen)
            runner.check_same(identity, directory, free=_OF_THE_STEP)
            baseline = os.path.join(directory, "random_init")
            folder = step_folder(directory, frozen.step)
            with runner.begun(identity, directory):
                results = runner.evaluate(resolved, prepared, frozen, folder, baseline)
            write_json(os.path.join(directory, runner.RESULTS), results)
            log.record(frozen.step, results)
        done = done_steps(directory)
        newest = runner.read_json(os.path.join(step_folder(directory, done[-1]), runner.RESULTS))
        write_json(os.path.join(directory, runner.RESULTS), newest)  # a kill may have come between
        say(f"{run} has ended; its {len(done)} checkpoints are evaluated")
        return newest


def step_folder(directory: str, step: int) -> str:
    """Where the checkpoint of a step is evaluated."""
    return os.path.join(directory, f"step_{step:08d}")


def done_steps(directory: str) -> list[int]:
    """The steps whose evaluation is whole, in order."""
    pattern = os.path.join(glob.escape(directory), "step_*", runner.RESULTS)
    return sorted(int(path.split(os.sep)[-2].removeprefix("step_")) for path in glob.glob(pattern))


def has_ended(run: str) -> bool:
    """Whether a run has written its results, for the newest of its checkpoints, and not gone on."""
    results, config = (os.path.join(run, name) for name in (runner.RESULTS, "config.json"))
    steps = encoder.checkpoint_steps(run)
    try:
        # A process that goes on with a run first renews its config.
        if not steps or os.path.getmtime(results) < os.path.getmtime(config):
            return False
        return runner.read_json(results).get("steps", 0) <= steps[-1]
    except OSError:
        return False


def _inside_a_run(path: str) -> bool:
    return "checkpoints" in path.split(os.sep)[-2:]


def _checkpoints(config: ConfigDict, run: str, directory: str) -> Iterator[Frozen]:
    """Each checkpoint that is not evaluated yet; waits for more until the run has ended."""
    patience = 3600 * config.watch_patience_hours
    last_news, waiting = time.monotonic(), False
    while True:
        ended = has_ended(run)  # before the look: what a run saves last comes before its end
        steps = encoder.checkpoint_steps(run)
        new = sorted(set(steps) - set(done_steps(directory)))
        for step in new:
            frozen = _load_if_there(run, step, config.watch_poll_seconds)
            if frozen is not None:
                yield frozen
        if new:
            last_news, waiting = time.monotonic(), False
            continue
        if ended:
            if not steps:
                raise bad_field("checkpoint", config.checkpoint, "the run has no checkpoint")
            return
        if time.monotonic() - last_news > patience:
            raise UserError(
                f"config.watch_patience_hours={config.watch_patience_hours:g}: no new checkpoint "
                f"in {run} for so long, and the run has not ended"
            )
        if not waiting:
            say(f"waiting for the next checkpoint of {run}")
            waiting = True
        time.sleep(config.watch_poll_seconds)


def _load_if_there(run: str, step: int, patience: float) -> Frozen | None:
    """The checkpoint of a step; None where the run removed it before it could be read."""
    try:
        return encoder.load(run, step)
    except UserError:
        if step in encoder.checkpoint_steps(run):
            time.sleep(patience)  # it may be on its way out
            if step in encoder.checkpoint_steps(run):
                raise
    say(f"the checkpoint of step {step} was removed before it could be read")
    return None


class _Log:
    """The measures of all steps in the run's TensorBoard, each step once."""

    def __init__(self, run: str, directory: str):
        self._directory = directory
        here = os.path.realpath(directory)
        mark = hashlib.md5(here.encode()).hexdigest()[:6]  # two watches may have a name in common
        self._folder = os.path.join(run, "evaluation", f"{os.path.basename(here)}-{mark}")
        self._recorder: Recorder | None = None

    def __enter__(self) -> _Log:
        done = done_steps(self._directory)
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._recorder = Recorder(self._folder, done[-1] if done else 0)
        except OSError as e:  # such as of a run that another user owns
            self._folder = self._directory
            say(f"TensorBoard's points go to {self._folder}: {e.strerror or e}")
            self._recorder = Recorder(self._folder, done[-1] if done else 0)
        recorded = {step for steps, _ in self._recorder.history.values() for step in steps}
        for step in sorted(set(done) - recorded):  # killed between a result and its point
            path = os.path.join(step_folder(self._directory, step), runner.RESULTS)
            self.record(step, runner.read_json(path))
        return self

    def record(self, step: int, results: dict[str, Any]) -> None:
        """Writes the measures of a step."""
        assert self._recorder is not None
        found = runner.measures(results)
        if found:  # a job such as `embed` measures nothing
            self._recorder.write(step, found, {})
            self._recorder.flush()

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            with contextlib.suppress(OSError):
                self._recorder.close()
