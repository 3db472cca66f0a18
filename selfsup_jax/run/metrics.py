"""The metrics of a run: `metrics.jsonl` and TensorBoard events, each step only once."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

import numpy as np

from selfsup_jax import paths
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError, some_of
from selfsup_jax.run import events, identity
from selfsup_jax.run.files import growing, sync, whole_file
from selfsup_jax.run.progress import log
from selfsup_jax.run.tags import WALL_TIME, grouped

FILE = "metrics.jsonl"
_FLUSH_SECONDS = 60.0  # between checkpoints, in a bucket, where each flush writes all anew


class Writer(Protocol):
    """What a run calls of `clu.metric_writers.MetricWriter`; any of those can be given."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...  # noqa: D102
    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...  # noqa: D102
    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...  # noqa: D102
    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...  # noqa: D102
    def flush(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Recorder:
    """Writes a run's scalars, and keeps all of them in memory from step 1 on.

    A resumed run first deletes the records of the steps after its checkpoint, since these steps run
    again. So no step is recorded twice, and none is missing.

    Args:
        workdir: the directory of `metrics.jsonl` (one object per line: "step", its values and
            "wall_time") and of TensorBoard's events.
        first_step: the step of the checkpoint from which the run resumes; 0 for a new run.
        every: steps from point to point, to tell if points are missing before `first_step`.
        config: of a new run, nested, for TensorBoard; None for none.
        writers: further places for what TensorBoard receives; none of them on the other hosts.

    Attributes:
        history: name -> (steps, values), all of `metrics.jsonl`. It is filled only on the host
            that writes.
    """

    def __init__(
        self,
        workdir: str,
        first_step: int,
        every: int = 0,
        config: Mapping[str, Any] | None = None,
        writers: Sequence[Writer] = (),
    ):
        self.history: dict[str, tuple[list[int], list[float]]] = {}
        self._file: IO[bytes] | None = None
        self._writers: list[Writer] = []
        self._others = writers
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
            if events.cut(event_file, first_step or -1):  # a new run has its own config at step 0
                log(f"{event_file}: is damaged; TensorBoard's points after that place are cut off")
            if paths.exists(event_file):  # the names of an earlier version were without a group
                events.rename(event_file, grouped)
        self._workdir = workdir
        self._config = None if paths.glob(workdir, events.PATTERN) else config
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Records a step's values; `timings` are not reproducible and go to the writers only."""
        if self._file is None:
            return
        _append(self.history, step, values)
        self._file.write(_text({"step": step, **values, WALL_TIME: round(time.time(), 3)}))
        scalars = {grouped(name): value for name, value in {**values, **timings}.items()}
        for writer in self._opened():
            writer.write_scalars(step, scalars)
        if paths.is_bucket(self._workdir) and time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Hands pictures, `[H, W, 3]` uint8 by name, to the writers."""
        if self._file is None:
            return
        for writer in self._opened():
            writer.write_images(step, {name: image[None] for name, image in pictures.items()})

    def _opened(self) -> list[Writer]:
        """The writers; the first call creates the event file, so not before the first point."""
        if not self._writers:
            events_file = events.EventWriter(self._workdir)
            if self._config is not None:
                text = json.dumps(self._config, indent=2, sort_keys=True)
                events_file.write_texts(0, {"config": "    " + text.replace("\n", "\n    ")})
                events_file.write_hparams(_hparams(self._config))
            self._writers = [events_file, *self._others]
        return self._writers

    def flush(self) -> None:
        """Returns when all is written; called before a checkpoint marks the steps as done."""
        if self._file is not None:
            sync(self._file)
        for writer in self._writers:
            writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        for writer in self._writers or self._others:
            writer.close()


def _hparams(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat fields that change what is learned, except for the augmentation."""
    fields = identity.flat(config)
    kept = identity.bound(fields, (*identity.SAME_RECIPE, "eval.*", "views.*", "job"))
    kept["seed"] = fields.get("seed", 0)
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in kept.items()
        if value is not None
    }


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
        values = {k: v for k, v in line.items() if k not in ("step", WALL_TIME)}
        _append(history, line["step"], values)
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
    return f"line{'s' * (len(numbers) > 1)} {some_of(numbers, 5)}"
