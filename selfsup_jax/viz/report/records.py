"""Reads workdirs: pretraining runs, evaluation jobs, and the record (`runs.json`) of a sweep."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from selfsup_jax import paths
from selfsup_jax.errors import UserError
from selfsup_jax.run.identity import flat
from selfsup_jax.viz.report.files import (
    Confusion,
    History,
    read_confusion,
    read_history,
    read_json,
    read_results,
    read_versions,
    whole,
)

_APART = re.compile(r"checkpoints$|plots$|step_\d+$|\.")  # folders that never contain runs
_DEPTH = 5  # levels of folders that are searched below a workdir: PARENT/SWEEP/VARIANT/seed_N/JOB


@dataclasses.dataclass
class Run:
    """A pretraining run.

    Attributes:
        path: real path of its workdir; the former path if the run is only in a sweep's record.
        config: as in `config.json`, nested; flat if it is from a sweep's record.
        settings: the config, flat: `{"optimizer.name": ...}`.
        results: from `results.json`; None while the run is not finished.
        history: from `metrics.jsonl`.
        variant: its name in a sweep, else empty.
        ended: why the run failed, else empty.
        versions: package -> version, as far as they are known.
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
        """The seed in the config."""
        return self.settings.get("seed")

    @property
    def last_step(self) -> int:
        """The last step in the history or the results; 0 if neither has one."""
        logged = max((steps[-1] for steps, _ in self.history.values()), default=0)
        return max(logged, whole((self.results or {}).get("steps")) or 0)


@dataclasses.dataclass
class Job:
    """An evaluation job.

    Attributes:
        path: real path of its workdir.
        config, settings, results: as in `Run`; in follow mode, of the newest checkpoint.
        by_step: in follow mode, (step, results) of each checkpoint, ordered by step.
        confusion: of the newest checkpoint.
    """

    path: str
    config: dict[str, Any]
    settings: dict[str, Any]
    results: dict[str, Any] | None
    by_step: list[tuple[int, dict[str, Any]]]
    confusion: Confusion | None

    @property
    def kind(self) -> str:
        """The kind in the config: `linear_probe`, ..."""
        return str(self.settings.get("job"))

    def get(self, name: str) -> Any:
        """A field of the results or else of `data_info`: `step`, `method`, `run`, ..."""
        value = (self.results or {}).get(name)
        return self.settings.get(f"data_info.{name}") if value is None else value

    @property
    def run(self) -> str | None:
        """Real path of the evaluated pretraining run; None if there is none."""
        run = self.get("run")
        return paths.real(run) if isinstance(run, str) and run else None


@dataclasses.dataclass
class Records:
    """All records that were read, and notes on what could not be read."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    jobs: list[Job] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def read(workdirs: Sequence[str]) -> Records:
    """Reads the workdirs and the folders below them, each folder once.

    Args:
        workdirs: of runs, jobs or sweeps, or folders that contain these.

    Returns:
        Runs and jobs in the order of `workdirs`, then of folder names.

    Raises:
        UserError: a workdir is not a folder, or contains no run, job or sweep.
    """
    records, seen = Records(), set[str]()
    for workdir in workdirs:
        paths.check(workdir, "WORKDIR")
        if not paths.isdir(workdir):
            raise UserError(f"{workdir}: does not exist")
        notes, any_here = len(records.notes), False
        for folder in _folders(paths.real(workdir)):
            known = folder in seen
            seen.add(folder)
            any_here |= known or _read_folder(folder, records)
        if not any_here:
            broken = "; ".join(records.notes[notes:])
            raise UserError(
                f"{workdir}: holds no run: {broken or 'no config.json of one, there or below'}"
            )
    _add_records(records, sorted(seen))
    return records


def _folders(top: str) -> Iterator[str]:
    for folder, names, _ in paths.walk(top):
        yield folder
        deep = os.path.relpath(folder, top).count(os.sep) >= _DEPTH - 1 and folder != top
        names[:] = [] if deep else sorted(n for n in names if not _APART.match(n))


def _read_folder(folder: str, records: Records) -> bool:
    """Adds the run or job of a folder. Returns whether the folder is a run, a job or a sweep."""
    if paths.exists(os.path.join(folder, "runs.json")):
        return True
    config = read_json(os.path.join(folder, "config.json"), records.notes)
    if not isinstance(config, dict) or not {"job", "method"} & set(config):
        return False
    if config.get("job", "pretrain") == "pretrain":
        records.runs.append(_read_run(folder, config, records.notes))
    else:
        records.jobs.append(_read_job(folder, config, records.notes))
    return True


def _read_run(folder: str, config: dict[str, Any], notes: list[str]) -> Run:
    run = Run(folder, config, flat(config), read_results(folder, notes))
    run.history = read_history(os.path.join(folder, "metrics.jsonl"), notes)
    run.versions = read_versions(folder)
    if run.results is None and paths.exists(os.path.join(folder, "non_finite.json")):
        run.ended = "a loss or gradient was no number"
    return run


def _read_job(folder: str, config: dict[str, Any], notes: list[str]) -> Job:
    by_step = []
    for name in sorted(paths.listdir(folder)):
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
    folders = [folder] + [os.path.join(folder, f"step_{step:08d}") for step, _ in by_step[-1:]]
    matrices = (read_confusion(os.path.join(path, "confusion.npz"), notes) for path in folders)
    return Job(folder, config, flat(config), results, by_step, next(filter(None, matrices), None))


# ----------------------------------------------------------------------------- sweep records


def _add_records(records: Records, folders: Sequence[str]) -> None:
    """Adds the records of `runs.json`: variants, reasons of failure, and runs not read so far."""
    runs = {run.path: run for run in records.runs}
    for folder in folders:
        path = os.path.join(folder, "runs.json")
        record = read_json(path, records.notes)
        if record is not None and not isinstance(record, dict):
            records.notes.append(f"{path}: is not a sweep's record, left out")
            continue
        for name, entry in (record or {}).items():
            if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
                records.notes.append(f"{path}: {name} is not a run's entry, left out")
                continue
            run_path = os.path.join(folder, name)
            if run_path not in runs:
                if any(run.results and run.results == entry.get("results") for run in records.runs):
                    continue  # a published copy of a run that was read
                config = {**entry["config"], "seed": entry.get("seed")}
                runs[run_path] = Run(run_path, config, flat(config))
                records.runs.append(runs[run_path])
            _add_record(runs[run_path], entry)


def _add_record(run: Run, entry: dict[str, Any]) -> None:
    run.variant = str(entry.get("variant") or "")
    results = entry.get("results")
    if isinstance(results, dict):
        run.ended = str(results.get("diverged") or "")
        if not run.ended:
            run.results = results if run.results is None else run.results
    if "jax" in entry:
        run.versions.setdefault("jax", str(entry["jax"]))
