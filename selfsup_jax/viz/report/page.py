"""Renders the page and writes it."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import os
import struct
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from selfsup_jax import __version__, paths
from selfsup_jax.errors import UserError
from selfsup_jax.run.files import whole_file, writing_to
from selfsup_jax.viz import titles
from selfsup_jax.viz.report import charts, curves, measures, recipes, summary
from selfsup_jax.viz.report.confusion import mistakes
from selfsup_jax.viz.report.files import whole
from selfsup_jax.viz.report.recipes import Recipe
from selfsup_jax.viz.report.records import Job, Records, read
from selfsup_jax.viz.report.series import Owners, run_name

GENERATOR = "selfsup_jax.report"  # in the page: it may be replaced by a newer one
COLOURS = 10  # in the style sheet; further owners reuse them with dashed lines
_DRAWN_ELSEWHERE = ("learning_curves", "confusion_matrix")
_PICTURES = {
    "view_pairs": "What the network sees: pairs of views",
    "representation_map": "Held-out images in two dimensions",
    "nearest_neighbours": "Nearest neighbours",
    "attention": "What the class token attends to",
}


@dataclasses.dataclass
class Picture:
    """A PNG file: its title, its size in pixels, and its bytes as base64."""

    title: str
    width: int
    height: int
    data: str


def write(workdirs: Sequence[str], output: str, title: str | None = None) -> str:
    """Writes a report on runs and evaluation jobs as one HTML file, atomically.

    Args:
        workdirs: of runs, jobs or sweeps, or folders that contain these.
        output: path of the file; an earlier report there is replaced.
        title: of the page; by default the runs' methods and data.

    Returns:
        One line that describes the content of the report.

    Raises:
        UserError: a workdir is missing or contains no run, or the file can't be written or is not
            a report.
    """
    _check_output(output)
    records = read(workdirs)
    text = render(records, workdirs, title)
    partial = f"{output}.{os.getpid()}.partial"
    with writing_to(output), whole_file(output, "w", partial, encoding="utf-8") as f:
        f.write(text)
    size = len(text.encode()) / 1e6
    return f"wrote {output} ({size:.1f} MB): {_count(records)}"


def _check_output(output: str) -> None:
    paths.check(output, "--output")
    try:
        with paths.open(output, "rb") as f:
            start = f.read(4096)
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"--output={output}: cannot be replaced: {e.strerror or e}") from e
    if GENERATOR.encode() not in start:
        raise UserError(f"--output={output}: is there and is not a report; choose another path")


def render(records: Records, workdirs: Sequence[str], title: str | None = None) -> str:
    """Returns the page as HTML text.

    Args:
        records: the records that were read.
        workdirs: as given; the page lists them.
        title: of the page; None for the runs' methods and data.
    """
    notes = list(records.notes)
    groups = recipes.group(records.runs)
    owners = Owners(groups, records.jobs)
    table = measures.table(owners, records.jobs, notes)
    dots = _dots(table)
    first, others = curves.learning(groups)
    watched = curves.watched(records.jobs, owners)
    panels = [*first, *others, *(panel for _, of_kind in watched for panel in of_kind)]
    page = {
        "title": title or _title(groups, records.jobs),
        "made": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        "count": _count(records),
        "summary": summary.sentences(groups, table),
        "unlabelled": [recipe.name for recipe in groups if not recipe.labelled],
        "given": list(workdirs),
        "version": __version__,
        "generator": GENERATOR,
        "recipes": groups,
        "owners": owners.names,
        "overviews": [recipes.overview(recipe) for recipe in groups],
        "table": table,
        "baselines": titles.BASELINES,
        "many_seeds": any(row.runs > 1 for row in table.rows),
        "dots": dots,
        "beside": {name for chart in dots for row in chart.rows for name, *_ in row["baselines"]},
        "drawn": {line.owner for panel in panels for line in panel.lines},  # that have curves
        "curves": first,
        "more_curves": others,
        "watched": watched,
        "mistakes": _mistakes(records.jobs, owners),
        "pictures": _pictures(records, owners, notes),
        "differences": recipes.differences(groups) if len(groups) > 1 else [],
        "configs": _configs(records, owners),
        "runs": [(recipe, run) for recipe in groups for run in recipe.runs],
        "jobs": records.jobs,
        "without": _without(groups),
        "notes": list(dict.fromkeys(notes)),
        "charts": charts,
    }
    return _environment().get_template("page.html.j2").render(page)


def _environment() -> jinja2.Environment:
    folder = resources.files("selfsup_jax.viz.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = recipes.shown
    environment.filters["colour"] = lambda owner: f"c{owner % COLOURS}"
    environment.filters["dash"] = lambda owner: f"d{owner // COLOURS % 3}"
    return environment


def _count(records: Records) -> str:
    parts = [(len(records.runs), "run"), (len(records.jobs), "evaluation job")]
    return ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in parts if n) or "no run"


def _title(groups: Sequence[Recipe], jobs: Sequence[Job]) -> str:
    methods = dict.fromkeys(recipe.method for recipe in groups)
    methods |= dict.fromkeys(recipes.method_name(job.get("method")) for job in jobs)
    data = list(filter(None, dict.fromkeys(recipe.data for recipe in groups)))
    names = list(filter(None, methods)) or ["Self-supervised learning"]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{listed} on {' and '.join(data)}" if 0 < len(data) <= 2 else listed


def _dots(table: measures.Table) -> list[charts.Dots]:
    """A chart of last steps for each measure except top-5 and the mean per class."""
    dot_charts = []
    for column in table.columns:
        if column.measure.endswith(("_top5", "_mean_per_class")):
            continue
        rows = [row for row in table.rows if column in row.cells and row.last]
        dot_rows = []
        for row in rows:
            cell, base = row.cells[column], table.beside(row, column)
            dot_rows.append(
                charts.DotRow(
                    row.owner, row.name, cell.values, cell.mean, cell.std, cell.text, base
                )
            )
        if len(dot_rows) > 1 or any(row.baselines for row in dot_rows):
            group = "" if column.group == measures.CLOSING else f"{column.group}: "
            dot_charts.append(charts.dots(group + column.title, dot_rows))
    return dot_charts


def _mistakes(jobs: Sequence[Job], owners: Owners) -> list[dict[str, Any]]:
    entries = []
    for job in jobs:
        if job.confusion is not None and job.confusion.matrix.sum():
            name, step = _job_name(job, owners), whole(job.get("step"))
            entries.append({"name": name, "step": step, "mistakes": mistakes(job.confusion)})
    return entries


def _job_name(job: Job, owners: Owners) -> str:
    return f"{owners.name(job)} · {titles.KINDS.get(job.kind, job.kind)}"


# ----------------------------------------------------------------------------- pictures


def _pictures(
    records: Records, owners: Owners, notes: list[str]
) -> list[tuple[str, list[Picture]]]:
    """(name of a run or a job, its pictures), for those that have pictures."""
    named = [(run_name(recipe, run), run.path) for recipe in owners.recipes for run in recipe.runs]
    named += [(_job_name(job, owners), job.path) for job in records.jobs]
    result = []
    for name, folder in named:
        files = sorted(paths.glob(folder, "plots/*.png"), key=_order)
        loaded = (_load(path, notes) for path in files)
        pictures = [picture for picture in loaded if picture is not None]
        if pictures:
            result.append((name, pictures))
    return result


def _order(path: str) -> tuple[int, str]:
    name = os.path.basename(path).removesuffix(".png")
    return (list(_PICTURES).index(name) if name in _PICTURES else len(_PICTURES)), name


def _load(path: str, notes: list[str]) -> Picture | None:
    name = os.path.basename(path).removesuffix(".png")
    if name in _DRAWN_ELSEWHERE:
        return None
    try:
        with paths.open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        notes.append(f"{path}: cannot be read, left out: {e.strerror}")
        return None
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        notes.append(f"{path}: is not a PNG file, left out")
        return None
    width, height = struct.unpack(">II", data[16:24])
    title = _PICTURES.get(name, name.replace("_", " ").capitalize())
    return Picture(title, width, height, base64.b64encode(data).decode())


# ----------------------------------------------------------------------------- configs


def _configs(records: Records, owners: Owners) -> list[tuple[str, str, str]]:
    """(name, config, results) of each run and job, as JSON."""
    entries: list[tuple[str, Any]] = []
    for recipe in owners.recipes:
        for run in recipe.runs:
            entries.append((f"{recipe.name}, seed {recipes.shown(run.seed)}", run))
    for job in records.jobs:
        entries.append((f"{_job_name(job, owners)} ({os.path.basename(job.path)})", job))
    return [
        (name, _json(entry.config), _json(entry.results) if entry.results is not None else "")
        for name, entry in entries
    ]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)


def _without(groups: Sequence[Recipe]) -> dict[str, list[str]]:
    """What is missing -> names of the recipes that lack it."""
    missing = {
        "No curves (no metrics.jsonl)": [
            r.name for r in groups if not any(x.history for x in r.runs)
        ],
        "Not finished": [r.name for r in groups if len(r.done) < len(r.runs)],
    }
    return {what: names for what, names in missing.items() if names}
