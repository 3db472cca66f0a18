"""The metrics of a run: `metrics.jsonl` and TensorBoard events, each step only once."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from selfsup_jax import paths
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError
from selfsup_jax.run import events
from selfsup_jax.run.files import growing, sync, whole_file
from selfsup_jax.run.progress import log

FILE = "metrics.jsonl"
_FLUSH_SECONDS = 60.0  # between checkpoints, in a bucket, where each flush writes all anew


class Recorder:
    """Writes a run's scalars, and keeps all of them in memory from step 1 on.

    A resumed run first deletes the records of the steps after its checkpoint, since these steps run
    again. So no step is recorded twice, and none is missing.

    Args:
        workdir: the directory of `metrics.jsonl` (one object per line: "step" and its values) and
            of TensorBoard's events.
        first_step: the step of the checkpoint from which the run resumes; 0 for a new run.
        every: steps from point to point, to tell if points are missing before `first_step`.

    Attributes:
        history: name -> (steps, values), all of `metrics.jsonl`. It is filled only on the host
            that writes.
    """

    def __init__(self, workdir: str, first_step: int, every: int = 0):
        self.history: dict[str, tuple[list[int], list[float]]] = {}
        self._file: IO[bytes] | None = None
        self._writer: events.EventWriter | None = None
        if not hosts.is_writer():
            return
        path = os.path.join(workdir, FILE)
        lines, broken = _lines_up_to(path, first_step)
        if first_step and not paths.exists(path):
            log(f"{path} is missing: the curves begin at step {first_step + 1:,}")
        elif every and (first := _first_missing(lines, first_step, every)):
            log(f"{path}: has no points of steps {first:,} to {first_step:,}, which were done")
        if broken:
            aside = os.path.join(workdir, "metrics.damaged.jsonl")
            with paths.open(path, "rb") as old, whole_file(aside, "wb") as copy:
                copy.write(old.read())
            log(f"{path}: {_listed(broken)} cannot be read, left out; all of it is in {aside}")
        if not first_step and _lines_up_to(path, sys.maxsize)[0]:
            aside = os.path.join(workdir, "metrics.before.jsonl")
            log(f"no checkpoint to resume from: earlier metrics are moved to {aside}")
            paths.move(path, aside)
        self.history = _history(lines)
        self._file = growing(path, b"".join(map(_text, lines)))
        for event_file in paths.glob(workdir, events.PATTERN):
            if events.cut(event_file, first_step):
                log(f"{event_file}: is damaged; TensorBoard's points after that place are cut off")
        self._workdir = workdir
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Records a step's values; `timings` are not reproducible and go to TensorBoard only."""
        if self._file is None:
            return
        if self._writer is None:  # creates the event file, so not before the first point
            self._writer = events.EventWriter(self._workdir)
        _append(self.history, step, values)
        self._file.write(_text({"step": step, **values}))
        self._writer.scalars(step, {**values, **timings})
        if paths.is_bucket(self._workdir) and time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when all is written; called before a checkpoint marks the steps as done."""
        if self._file is not None:
            sync(self._file)
        if self._writer is not None:
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _first_missing(lines: list[dict], first_step: int, every: int) -> int:
    """The first step after the last point, if a point or more are missing there; else 0."""
    steps = [0, *(int(line["step"]) for line in lines if line["step"] > 0)]
    interval = max([every, *(b - a for a, b in itertools.pairwise(steps))])
    return steps[-1] + 1 if steps[-1] + interval <= first_step else 0


def read_history(workdir: str) -> dict[str, tuple[list[int], list[float]]]:
    """The `Recorder.history` of a workdir; raises `UserError` if a line cannot be read."""
    path = os.path.join(workdir, FILE)
    lines, broken = _lines_up_to(path, sys.maxsize)
    if broken:
        raise UserError(f"{path}: {_listed(broken)} cannot be read; move the file away")
    return _history(lines)


def _history(lines: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    history: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        _append(history, line["step"], {k: v for k, v in line.items() if k != "step"})
    return history


def _append(
    history: dict[str, tuple[list[int], list[float]]], step: int, values: Mapping[str, float]
) -> None:
    for name, value in values.items():
        steps, series = history.setdefault(name, ([], []))
        steps.append(step)
        series.append(value)


def _lines_up_to(path: str, last_step: int) -> tuple[list[dict], list[int]]:
    """The objects of a metrics file up to a step, and the numbers of the lines that hold none.

    An incomplete last line is ignored.
    """
    lines, broken = [], []
    try:
        with paths.open(path, "rb") as f:
            for number, text in enumerate(f, start=1):
                if not text.endswith(b"\n"):
                    break
                line = _line(text)
                if line is None:
                    broken.append(number)
                elif line["step"] <= last_step:
                    lines.append(line)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}; move it away") from e
    return lines, broken


def _text(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # not UTF-8, or no JSON
        return None
    good = isinstance(line, dict) and isinstance(line.get("step"), int | float)
    return line if good and all(isinstance(v, int | float) for v in line.values()) else None


def _listed(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:5]))}{more}"
