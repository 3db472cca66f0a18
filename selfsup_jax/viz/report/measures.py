"""The table of evaluation results: a row for each recipe, a column for each measure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfsup_jax.viz.report.files import whole
from selfsup_jax.viz.report.recipes import method_name
from selfsup_jax.viz.report.records import Job
from selfsup_jax.viz.report.series import Owners, evaluated, group_labels, group_rank
from selfsup_jax.viz.titles import BASELINES, finite, fraction, measure_title, measures, rank

CLOSING = "at the end of pretraining"


class Column(NamedTuple):
    """A measure of one kind of evaluation; `title` is its heading in the table."""

    group: str
    measure: str
    title: str


@dataclasses.dataclass
class Cell:
    """Values of a measure in [0, 1], one per seed; `note` is the spread of a single value."""

    values: list[float]
    note: str = ""
    best: bool = False

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """In per cent: `95.8 ± 0.3`, or `95.8` for a single seed."""
        std = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{std}"


@dataclasses.dataclass
class Row:
    """A recipe's cells.

    Attributes:
        name: of the recipe.
        owner: index of the recipe, or of a run outside the recipes; see `Owners`.
        data: the pretraining data set, empty if unknown.
        runs: number of runs.
        about: a remark under the name: step, method, unknown run.
        last: whether the row is about last steps, as far as is known.
        cells: its measures.
        baselines: prefix -> the same measures of a baseline.
    """

    name: str
    owner: int
    data: str
    runs: int
    about: str = ""
    last: bool = True
    cells: dict[Column, Cell] = dataclasses.field(default_factory=dict)
    baselines: dict[str, dict[Column, Cell]] = dataclasses.field(default_factory=dict)


Common = dict[tuple[str, str], dict[Column, Cell]]  # (prefix, data set) -> cells of a baseline


@dataclasses.dataclass
class Table:
    """Ordered columns, rows, and the baselines that all rows of a data set have in common."""

    columns: list[Column]
    rows: list[Row]
    common: Common

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(kind of evaluation, number of its columns), in the order of the columns."""
        return list(Counter(column.group for column in self.columns).items())

    def beside(self, row: Row, column: Column) -> dict[str, float]:
        """Name -> mean of the baselines that were measured together with a row's measure."""
        common = {
            prefix: cells for (prefix, data), cells in self.common.items() if data == row.data
        }
        sources = common | row.baselines
        present = [p for p in BASELINES if column in sources.get(p, {})]
        return {BASELINES[p]: sources[p][column].mean for p in present}


class _Entry(NamedTuple):
    """One evaluation of one run: key of its row, kind, and results."""

    row: tuple[Any, ...]
    group: str
    run: str
    seed: Any  # of the evaluation
    results: Mapping[str, Any]


def table(owners: Owners, jobs: Sequence[Job], notes: list[str]) -> Table:
    """Joins the probes at the end of pretraining with the jobs that evaluated the same runs.

    A recipe's row shows the last step of each run. A job on another checkpoint, or on a run outside
    the recipes, has its own row.

    Args:
        owners: of the runs and the jobs of the report.
        jobs: of the report; those without results are left out.
        notes: receives warnings for the reader.
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
    """The row of a job: (key, row)."""
    owner, run, step = owners.number(job), owners.run(job), whole(job.get("step"))
    at_step = f"step {step:,}" if step is not None else ""
    if run is not None:
        recipe = owners.recipes[owner]
        row = Row(recipe.name, owner, recipe.data, len(recipe.runs))
        if run.results is not None and step in (None, whole(run.results.get("steps"))):
            return (owner, None), row
        return (owner, step), dataclasses.replace(row, about=at_step, last=False)
    what = "run not among those given" if job.run else "checkpoint of no run"
    about = ", ".join(filter(None, (method_name(job.get("method")), at_step, what)))
    return (owner, step), Row(owners.names[owner], owner, "", 1, about)


def _mark_earlier(rows: Mapping[tuple[Any, ...], Row], known: int) -> None:
    """For a run outside the recipes, whose last step is unknown, the newest step counts as last."""
    for (owner, step), row in rows.items():
        steps = [other or 0 for number, other in rows if number == owner]
        if owner >= known:
            row.last = (step or 0) == max(steps)


def _columns(entries: Sequence[_Entry], labels: Mapping[str, str]) -> list[Column]:
    """Probes at the end of pretraining first, then jobs by kind; measures sorted by `rank`."""
    groups = list(dict.fromkeys([CLOSING, *sorted(labels.values(), key=group_rank)]))
    columns: dict[tuple[str, str], Column] = {}
    for entry in entries:
        for name in measures(entry.results):
            title = measure_title(name, entry.group, entry.results.get(f"{name}_metric"))
            if name.startswith("knn_"):
                title += knn_settings([e.results for e in entries if e.group == entry.group])
            columns[entry.group, name] = Column(entry.group, name, title)

    return sorted(columns.values(), key=lambda c: (groups.index(c.group), rank(c.measure)))


def knn_settings(results: Sequence[Mapping[str, Any]]) -> str:
    """`, k 20, temperature 0.1`: those of kNN in these results, all that differ."""
    ks = sorted({k for r in results if (k := whole(r.get("knn_k")))})
    heats = sorted({t for r in results if (t := finite(r.get("knn_temperature")))})
    parts = [", k " + " or ".join(map(str, ks))] if ks else []
    parts += [", temperature " + " or ".join(f"{t:g}" for t in heats)] if heats else []
    return "".join(parts)


def _fill(row: Row, entries: Sequence[_Entry], columns: Sequence[Column], notes: list[str]) -> None:
    """Fills the row's cells: a value per run or, for a single run, per seed of the evaluation."""
    for column in columns:
        by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
        for entry in entries:
            if (
                entry.group == column.group
                and fraction(entry.results.get(column.measure)) is not None
            ):
                seeds = by_run.setdefault(entry.run, {})
                if str(entry.seed) in seeds:
                    note = f"{row.name}: evaluated twice ({column.group}); the later one is shown"
                    notes.extend([note] * (note not in notes))
                seeds[str(entry.seed)] = entry.results
        if by_run:
            row.cells[column] = _cell(column.measure, by_run)
        for prefix in BASELINES:
            name = prefix + column.measure
            with_value = {
                run: {s: r for s, r in seeds.items() if fraction(r.get(name)) is not None}
                for run, seeds in by_run.items()
            }
            with_value = {run: seeds for run, seeds in with_value.items() if seeds}
            if with_value:
                row.baselines.setdefault(prefix, {})[column] = _cell(name, with_value)


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
    """Marks the best of several last steps in each column, separately for each data set."""
    for column in columns:
        by_data: dict[str, list[Cell]] = {}
        for row in rows:
            if column in row.cells and row.last:
                data = row.data if column.group == CLOSING else ""  # a job's label names its data
                by_data.setdefault(data, []).append(row.cells[column])
        for cells in by_data.values():
            top = max(cell.mean for cell in cells)
            for cell in cells:
                cell.best = len(cells) > 1 and math.isclose(cell.mean, top, abs_tol=1e-9)


def _common_baselines(rows: Sequence[Row]) -> Common:
    """Removes the baselines that all rows of a data set share from the rows; returns them."""
    common: Common = {}
    for prefix, data in itertools.product(BASELINES, dict.fromkeys(row.data for row in rows)):
        with_prefix = [row for row in rows if row.data == data and prefix in row.baselines]
        texts_by_column: dict[Column, set[str]] = {}
        for row in with_prefix:
            for column, cell in row.baselines[prefix].items():
                texts_by_column.setdefault(column, set()).add(cell.text)
        if len(with_prefix) > 1 and all(len(texts) == 1 for texts in texts_by_column.values()):
            common[prefix, data] = {}
            for row in with_prefix:
                common[prefix, data] |= row.baselines.pop(prefix)
    return common
