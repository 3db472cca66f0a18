"""How a run ends early: signals, numbers that are no numbers, disks that take no more."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
import numpy as np

from selfsup_jax import parallel
from selfsup_jax.errors import NotFinite, Stopped, UserError

_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OF_A_FILE = (errno.EACCES, errno.EPERM, errno.ENOENT)  # such as of a workdir that was removed


class StopSignals:
    """From `catch` to its end SIGTERM and Ctrl-C are noted, for the loop to ask after each step.

    A second signal ends the process at once, as if it had not been caught. In a job of many hosts
    `jax.distributed` takes SIGTERM and agrees with the others on a step; Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        return self

    def catch(self) -> None:
        """Begins: once there is a step to save. Before, a signal may as well end the process."""
        if threading.current_thread() is threading.main_thread():  # else Python takes no handlers
            many = jax.process_count() > 1
            for number in (signal.SIGINT,) if many else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._received = number
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def received(self, step: int) -> int | None:
        """The signal that asks for a stop after this step, on every host at the same; or None."""
        if jax.process_count() > 1:
            return signal.SIGTERM if parallel.reached_preemption(step) else None
        return self._received

    def pending(self) -> int | None:
        """A signal that came after the last step was asked about; on one host only."""
        return self._received if jax.process_count() == 1 else None


def stopped(number: int, step: int, workdir: str) -> Stopped:
    """What ends the process after a signal, once step `step` is saved."""
    name = signal.Signals(number).name
    return Stopped(
        f"{name}: stopped after step {step:,}, which is saved in {workdir}; the same command goes "
        "on from there",
        status=128 + number,
    )


class FiniteWatch:
    """Finds the step at which the loss or a gradient is no longer finite.

    Steps are looked at `lag` steps late, when they are done anyway: looking at once would keep the
    device waiting for the host.
    """

    def __init__(self, workdir: str, lag: int = 2):
        self._workdir = workdir
        self._lag = lag
        self._waiting: collections.deque = collections.deque()

    def add(self, step: int, metrics: dict[str, Any], names: np.ndarray) -> None:
        """Takes a step's metrics, still on the device, and the names of its images on this host.

        Raises:
            NotFinite: an earlier step was not.
        """
        finite = metrics["finite"].addressable_shards[0].data
        finite.copy_to_host_async()
        self._waiting.append((step, finite, metrics, names))
        self._look(self._lag)

    def drain(self) -> None:
        """Looks at all steps so far; raises as `add` does."""
        self._look(0)

    def _look(self, lag: int) -> None:
        while len(self._waiting) > lag:
            step, finite, metrics, names = self._waiting.popleft()
            if not np.asarray(finite)[0]:
                self._stop(step, metrics, names)

    def _stop(self, step: int, metrics: dict[str, Any], names: np.ndarray) -> None:
        values = {k: float(v) for k, v in parallel.unreplicate(metrics).items()}
        broken = sorted(k for k, v in values.items() if k != "finite" and not np.isfinite(v))
        what = ", ".join(f"{name} {values[name]}" for name in broken)
        suffix = "" if jax.process_count() == 1 else f"_host{jax.process_index()}"
        path = os.path.join(self._workdir, f"non_finite{suffix}.json")
        found = {
            "step": step,
            "non_finite": broken,
            "metrics": {k: v if np.isfinite(v) else str(v) for k, v in values.items()},
            "images": [str(name) for name in names],
        }
        write_json(path, found)
        raise NotFinite(
            f"step {step} is not finite: {what}; its images are named in {path}. "
            "The last good checkpoint stays; a lower config.optimizer.learning_rate or a longer "
            "warm-up may help, in another --workdir"
        )


@contextlib.contextmanager
def disk_errors(workdir: str, latest_step: Callable[[], int | None]) -> Iterator[None]:
    """Turns what a full or broken disk raises into one line that says what is still there."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as e:
        reason = _disk_reason(e, workdir)
        if reason is None:
            raise
        saved = latest_step()
        there = f"the last good checkpoint is of step {saved}" if saved else "no checkpoint yet"
        raise UserError(f"--workdir={workdir}: cannot be written to: {reason}; {there}") from e


@contextlib.contextmanager
def writing_to(folder: str) -> Iterator[None]:
    """Turns what the system says of a folder that takes no files into one line."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{folder}: cannot be written to: {e.strerror}") from e


def _disk_reason(e: BaseException, workdir: str) -> str | None:
    """The system's words for what the workdir's disk did, where that is what went wrong."""
    root = os.path.abspath(workdir)
    if isinstance(e, OSError) and e.errno in (*_FULL_OR_BROKEN, *_OF_A_FILE):
        if isinstance(e.filename, str):
            inside = os.path.commonpath([root, os.path.abspath(e.filename)]) == root
            return os.strerror(e.errno) if inside else None
        if e.errno in _FULL_OR_BROKEN:  # of a file that was open: a run writes nowhere else
            return os.strerror(e.errno)
    # TensorStore and TensorFlow wrap the system's error in their own, the file's name with it.
    for number in _FULL_OR_BROKEN:
        if os.strerror(number) in str(e) and (root in str(e) or workdir in str(e)):
            return os.strerror(number)
    return _disk_reason(e.__cause__, workdir) if e.__cause__ is not None else None


@contextlib.contextmanager
def whole_file(path: str, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """`open(path, mode)` to write: the file is there whole when the block ends, or as it was."""
    with open(path + ".partial", mode, **options) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".partial", path)


def write_json(path: str, tree: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with whole_file(path) as f:
        json.dump(tree, f, indent=2, sort_keys=True)
        f.write("\n")
