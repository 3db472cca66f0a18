"""Reads workdirs: pretraining runs, evaluation jobs, and the record of a study."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from selfsup_jax.errors import UserError
from selfsup_jax.viz.report.files import (
    Confusion,
    History,
    flat,
    read_confusion,
    read_history,
    read_json,
    read_results,
    read_versions,
    whole,
)

_APART = re.compile(r"checkpoints$|plots$|step_\d+$|\.")  # folders that hold no runs of their own
_DEPTH = 5  # folders below a workdir that are looked into: PARENT/STUDY/VARIANT/seed_N/JOB


@dataclasses.dataclass
class Run:
    """A pretraining run.

    Attributes:
        path: real path of its workdir; of a run that is only in a study's record, where it was.
        config: as in `config.json`, nested; flat if it is from a study's record.
        settings: the same, flat: `{"optimizer.name": ...}`.
        results: of `results.json`; None while the run is not finished.
        history: of `metrics.jsonl`.
        variant: its name in a study, else empty.
        ended: why it came to nothing, else empty.
        versions: package -> version, as far as the run tells.
    """

    path: str
    config: dict[str, Any]
    settings: dict[str, Any]
    results: dict[str, Any] | None = None
    history: History = dataclasses.field(default_factory=dict)
    variant: str = ""
    ended: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> Any:
        """As in the config."""
        return self.settings.get("seed")

    @property
    def last_step(self) -> int:
        """The last step that it has logged or ended with; 0 if it tells none."""
        logged = max((steps[-1] for steps, _ in self.history.values()), default=0)
        return max(logged, whole((self.results or {}).get("steps")) or 0)


@dataclasses.dataclass
class Job:
    """An evaluation job.

    Attributes:
        path: real path of its workdir.
        config, settings, results: as of `Run`. Of a job that watches: those of the newest step.
        by_step: of a job that watches: (step, results) of each checkpoint, in the order of steps.
        confusion: of the newest step.
    """

    path: str
    config: dict[str, Any]
    settings: dict[str, Any]
    results: dict[str, Any] | None
    by_step: list[tuple[int, dict[str, Any]]]
    confusion: Confusion | None

    @property
    def kind(self) -> str:
        """Its name in the config: `linear_probe`, ..."""
        return str(self.settings.get("job"))

    def tell(self, name: str) -> Any:
        """A field of the results, or else of what the job found: `step`, `method`, `run`, ..."""
        value = (self.results or {}).get(name)
        return self.settings.get(f"found.{name}") if value is None else value

    @property
    def run(self) -> str | None:
        """Real path of the pretraining run that it evaluates; None if there is none."""
        run = self.tell("run")
        return os.path.realpath(run) if isinstance(run, str) and run else None


@dataclasses.dataclass
class Found:
    """All that was read, and notes on what could not be."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    jobs: list[Job] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def read(workdirs: Sequence[str]) -> Found:
    """Reads the workdirs and all that lies below them, each folder once.

    Args:
        workdirs: of runs, jobs or studies, or folders of these.

    Returns:
        Runs and jobs in the order of `workdirs`, below each by name.

    Raises:
        UserError: a workdir is no folder, or nothing of ours is in it.
    """
    found, seen = Found(), set[str]()
    for workdir in workdirs:
        if not os.path.isdir(workdir):
            raise UserError(f"{workdir}: there is no such folder")
        notes, any_here = len(found.notes), False
        for folder in _folders(os.path.realpath(workdir)):
            again = folder in seen
            seen.add(folder)
            any_here |= again or _read_folder(folder, found)
        if not any_here:
            broken = "; ".join(found.notes[notes:])
            raise UserError(
                f"{workdir}: holds no run: {broken or 'no config.json of one, there or below'}"
            )
    _add_records(found, sorted(seen))
    return found


def _folders(top: str) -> Iterator[str]:
    for folder, names, _ in os.walk(top):
        yield folder
        deep = os.path.relpath(folder, top).count(os.sep) >= _DEPTH - 1 and folder != top
        names[:] = [] if deep else sorted(n for n in names if not _APART.match(n))


def _read_folder(folder: str, found: Found) -> bool:
    """Adds the run or the job that lies in a folder. Returns whether there is something of ours."""
    if os.path.exists(os.path.join(folder, "runs.json")):
        return True
    config = read_json(os.path.join(folder, "config.json"), found.notes)
    if not isinstance(config, dict) or not {"job", "method"} & set(config):
        return False
    if config.get("job", "pretrain") == "pretrain":
        found.runs.append(_read_run(folder, config, found.notes))
    else:
        found.jobs.append(_read_job(folder, config, found.notes))
    return True


def _read_run(folder: str, config: dict[str, Any], notes: list[str]) -> Run:
    run = Run(folder, config, flat(config), read_results(folder, notes))
    run.history = read_history(os.path.join(folder, "metrics.jsonl"), notes)
    run.versions = read_versions(folder)
    if run.results is None and os.path.exists(os.path.join(folder, "non_finite.json")):
        run.ended = "a loss or gradient was no number"
    return run


def _read_job(folder: str, config: dict[str, Any], notes: list[str]) -> Job:
    by_step = []
    for name in sorted(os.listdir(folder)):
        step = name.removeprefix("step_")
        if step != name and step.isdecimal():
            results = read_results(os.path.join(folder, name), notes)
            if results is not None:
                by_step.append((int(step), results))
    by_step.sort(key=lambda item: item[0])
    results = read_results(folder, notes)
    if results is None and by_step:
        results = by_step[-1][1]
    if results is None:
        notes.append(f"{folder}: the {config.get('job')} job is not finished")
    places = [folder] + [os.path.join(folder, f"step_{step:08d}") for step, _ in by_step[-1:]]
    found = (read_confusion(os.path.join(place, "confusion.npz"), notes) for place in places)
    return Job(folder, config, flat(config), results, by_step, next(filter(None, found), None))


# ----------------------------------------------------------------------------- a study's record


def _add_records(found: Found, folders: Sequence[str]) -> None:
    """Adds what `runs.json` of studies tells: variants, endings, and runs that lie elsewhere."""
    runs = {run.path: run for run in found.runs}
    for folder in folders:
        path = os.path.join(folder, "runs.json")
        record = read_json(path, found.notes)
        if record is not None and not isinstance(record, dict):
            found.notes.append(f"{path}: is no study's record, left out")
            continue
        for name, entry in (record or {}).items():
            if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
                found.notes.append(f"{path}: {name} is not a run's entry, left out")
                continue
            place = os.path.join(folder, name)
            if place not in runs:
                if any(run.results and run.results == entry.get("results") for run in found.runs):
                    continue  # a published copy of a run that is here
                config = {**entry["config"], "seed": entry.get("seed")}
                runs[place] = Run(place, config, flat(config))
                found.runs.append(runs[place])
            _add_record(runs[place], entry)


def _add_record(run: Run, entry: dict[str, Any]) -> None:
    run.variant = str(entry.get("variant") or "")
    results = entry.get("results")
    if isinstance(results, dict):
        run.ended = str(results.get("diverged") or "")
        if not run.ended:
            run.results = results if run.results is None else run.results
    if "jax" in entry:
        run.versions.setdefault("jax", str(entry["jax"]))
