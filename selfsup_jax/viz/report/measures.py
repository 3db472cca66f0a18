"""The table of what the encoders are worth: a row for each recipe, a column for each measure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfsup_jax.viz.report.files import finite, fraction, whole
from selfsup_jax.viz.report.recipes import method_name
from selfsup_jax.viz.report.records import Job
from selfsup_jax.viz.report.series import Owners, evaluated
from selfsup_jax.viz.report.titles import (
    BASELINES,
    group_labels,
    group_rank,
    measure_title,
    measures,
    rank,
)

CLOSING = "at the end of pretraining"


class Column(NamedTuple):
    """A measure of one kind of evaluation; `title` is what the table calls it."""

    group: str
    measure: str
    title: str


@dataclasses.dataclass
class Cell:
    """Values of a measure, fractions in [0, 1], one for each seed; `note` is about a single one."""

    values: list[float]
    note: str = ""
    best: bool = False

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """In per cent: `95.8 ± 0.3`, or `95.8` of a single seed."""
        std = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{std}"


@dataclasses.dataclass
class Row:
    """A recipe's cells.

    Attributes:
        name: of the recipe.
        owner: number of the recipe, or of what stands for one; see `Owners`.
        data: that it was pretrained on, empty if that isn't known.
        runs: how many it has.
        about: what a reader must know of the row.
        last: whether it is about last steps, as far as that can be told.
        cells: its measures.
        baselines: prefix -> the same of what was not trained.
    """

    name: str
    owner: int
    data: str
    runs: int
    about: str = ""
    last: bool = True
    cells: dict[Column, Cell] = dataclasses.field(default_factory=dict)
    baselines: dict[str, dict[Column, Cell]] = dataclasses.field(default_factory=dict)


Common = dict[tuple[str, str], dict[Column, Cell]]  # (prefix, data set) -> a baseline's cells


@dataclasses.dataclass
class Table:
    """Columns in order, rows, and the baselines that are the same for all rows of a data set."""

    columns: list[Column]
    rows: list[Row]
    common: Common

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(kind of evaluation, number of its columns), in the order of the columns."""
        return list(Counter(column.group for column in self.columns).items())

    def beside(self, row: Row, column: Column) -> dict[str, float]:
        """Baseline's name -> its mean, of those that were measured beside a row's measure."""
        common = {
            prefix: cells for (prefix, data), cells in self.common.items() if data == row.data
        }
        sources = common | row.baselines
        present = [p for p in BASELINES if column in sources.get(p, {})]
        return {BASELINES[p]: sources[p][column].mean for p in present}


class _Entry(NamedTuple):
    """One evaluation of one run: its row, and its results."""

    row: tuple[Any, ...]
    group: str
    run: str
    seed: Any  # of the evaluation
    results: Mapping[str, Any]


def table(owners: Owners, jobs: Sequence[Job], notes: list[str]) -> Table:
    """Joins the closing probes of the runs with the jobs that evaluated them.

    Of each run its last step stands in the recipe's row; a job on another checkpoint has a row of
    its own, and so has a job on a run that is not among the recipes.

    Args:
        owners: of the runs that are given, and of the jobs.
        jobs: that are given; those without results are left out.
        notes: takes what a reader must know.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    entries: list[_Entry] = []
    for i, recipe in enumerate(owners.recipes):
        rows[i, None] = Row(recipe.name, i, recipe.data, len(recipe.runs))
        for run in recipe.runs:
            if run.results is not None:
                entries.append(_Entry((i, None), CLOSING, run.path, run.seed, run.results))
    labels = group_labels(jobs)
    for job in jobs:
        if job.results is not None:
            key, row = _row_of_job(job, owners)
            rows.setdefault(key, row)
            seed = job.results.get("seed", job.settings.get("seed"))
            entries.append(_Entry(key, labels[job.path], evaluated(job), seed, job.results))
    columns = _columns(entries, labels)
    for key, row in rows.items():
        _fill(row, [entry for entry in entries if entry.row == key], columns, notes)
    kept = [row for row in rows.values() if row.cells]
    _mark_earlier(rows, len(owners.recipes))
    kept.sort(key=lambda row: row.owner)
    _mark_best(kept, columns)
    return Table(columns, kept, _common_baselines(kept))


def _row_of_job(job: Job, owners: Owners) -> tuple[tuple[Any, ...], Row]:
    """(its key, the row) that a job belongs to."""
    owner, run, step = owners.number(job), owners.run(job), whole(job.tell("step"))
    at_step = f"step {step:,}" if step is not None else ""
    if run is not None:
        recipe = owners.recipes[owner]
        row = Row(recipe.name, owner, recipe.data, len(recipe.runs))
        if run.results is not None and step in (None, whole(run.results.get("steps"))):
            return (owner, None), row
        return (owner, step), dataclasses.replace(row, about=at_step, last=False)
    what = "run not among those given" if job.run else "checkpoint of no run"
    about = ", ".join(filter(None, (method_name(job.tell("method")), at_step, what)))
    return (owner, step), Row(owners.names[owner], owner, "", 1, about)


def _mark_earlier(rows: Mapping[tuple[Any, ...], Row], known: int) -> None:
    """Of a run that isn't there, whose end isn't known, the newest step counts as the last."""
    for (owner, step), row in rows.items():
        steps = [other or 0 for number, other in rows if number == owner]
        if owner >= known:
            row.last = (step or 0) == max(steps)


def _columns(entries: Sequence[_Entry], labels: Mapping[str, str]) -> list[Column]:
    """Closing probes first, then the jobs by kind; measures in the order of `KINDS`."""
    groups = list(dict.fromkeys([CLOSING, *sorted(labels.values(), key=group_rank)]))
    found: dict[tuple[str, str], Column] = {}
    for entry in entries:
        for name in measures(entry.results):
            title = measure_title(name, entry.group, entry.results.get(f"{name}_metric"))
            found[entry.group, name] = Column(entry.group, name, title)

    return sorted(found.values(), key=lambda c: (groups.index(c.group), rank(c.measure)))


def _fill(row: Row, entries: Sequence[_Entry], columns: Sequence[Column], notes: list[str]) -> None:
    """The row's cells: a value for each run or, of one run, for each seed of the evaluation."""
    for column in columns:
        by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
        for entry in entries:
            if (
                entry.group == column.group
                and fraction(entry.results.get(column.measure)) is not None
            ):
                seeds = by_run.setdefault(entry.run, {})
                if str(entry.seed) in seeds:
                    told = f"{row.name}: evaluated twice ({column.group}); the later one is shown"
                    notes.extend([told] * (told not in notes))
                seeds[str(entry.seed)] = entry.results
        if by_run:
            row.cells[column] = _cell(column.measure, by_run)
        for prefix in BASELINES:
            name = prefix + column.measure
            with_it = {
                run: {s: r for s, r in seeds.items() if fraction(r.get(name)) is not None}
                for run, seeds in by_run.items()
            }
            with_it = {run: seeds for run, seeds in with_it.items() if seeds}
            if with_it:
                row.baselines.setdefault(prefix, {})[column] = _cell(name, with_it)


def _cell(name: str, by_run: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Cell:
    groups = [[float(r[name]) for r in seeds.values()] for seeds in by_run.values()]
    values = groups[0] if len(groups) == 1 else [float(np.mean(group)) for group in groups]
    note = ""
    if len(values) == 1:
        results = next(iter(next(iter(by_run.values())).values()))
        base = name.removesuffix("_top1")
        for spread, what in ((f"{base}_ci95", "95 % CI:"), (f"{name}_std", "sd of draws:")):
            size = finite(results.get(spread))
            if size is not None:
                note = f"{what} {100 * size:.1f}"
    return Cell(values, note)


def _mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """The best last step of each column, if there are several; never across data sets."""
    for column in columns:
        by_data: dict[str, list[Cell]] = {}
        for row in rows:
            if column in row.cells and row.last:
                data = row.data if column.group == CLOSING else ""  # a job's data is in its label
                by_data.setdefault(data, []).append(row.cells[column])
        for cells in by_data.values():
            top = max(cell.mean for cell in cells)
            for cell in cells:
                cell.best = len(cells) > 1 and math.isclose(cell.mean, top, abs_tol=1e-9)


def _common_baselines(rows: Sequence[Row]) -> Common:
    """Takes baselines that are the same in all rows of a data set out of these rows."""
    common: Common = {}
    for prefix, data in itertools.product(BASELINES, dict.fromkeys(row.data for row in rows)):
        having = [row for row in rows if row.data == data and prefix in row.baselines]
        found: dict[Column, set[str]] = {}
        for row in having:
            for column, cell in row.baselines[prefix].items():
                found.setdefault(column, set()).add(cell.text)
        if len(having) > 1 and all(len(texts) == 1 for texts in found.values()):
            common[prefix, data] = {}
            for row in having:
                common[prefix, data] |= row.baselines.pop(prefix)
    return common
