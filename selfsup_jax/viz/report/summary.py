"""The two sentences at the top of the page: what the encoders are worth, and how the runs went."""

from __future__ import annotations

from collections.abc import Sequence

from selfsup_jax.viz import verdict
from selfsup_jax.viz.report.measures import CLOSING, Column, Row, Table
from selfsup_jax.viz.report.recipes import Recipe
from selfsup_jax.viz.titles import BASELINES

_FIRST = ("linear_probe_top1", "knn_top1")  # the measures that are taken, if there are several


def sentences(recipes: Sequence[Recipe], table: Table) -> str:
    """The summary of a page; empty without runs and measures."""
    return " ".join(filter(None, (_worth(recipes, table), _health(recipes))))


def _worth(recipes: Sequence[Recipe], table: Table) -> str:
    column = _column(table)
    if column is None:
        labelled = any(recipe.labelled for recipe in recipes)
        why = "no results yet" if labelled else "there are no labels"
        return f"How good the features are is not measured: {why}." if recipes else ""
    rows = [row for row in table.rows if row.last and column in row.cells]
    rows.sort(key=lambda row: -row.cells[column].mean)
    data = max({row.data: None for row in rows}, key=[row.data for row in rows].count)
    of_data = [row for row in rows if row.data == data]
    best, others = of_data[0], of_data[1:]
    title = column.title if column.group == CLOSING else f"{column.group}, {column.title}"
    head, _, rest = title.partition(", ")
    measure = f"{head} ({rest})" if rest else head
    which = f"best {measure} is that of {best.name}:" if others else f"{measure} of {best.name} is"
    text = f"{f'On {data}, the' if data else 'The'} {which} {_value(best, column)}"
    base = table.beside(best, column).get(BASELINES["random_init_"])
    if base is not None:
        text += f", against {100 * base:.1f} % for its encoder never trained"
    if others:
        text += f"; next is {others[0].name} with {_value(others[0], column)}"
    return f"{text}."


def _column(table: Table) -> Column | None:
    """The measure of the first sentence: at the end of pretraining, before those of jobs."""
    columns = [c for c in table.columns if any(r.last and c in r.cells for r in table.rows)]
    known = [c for name in _FIRST for c in columns if c.measure == name]
    return next((c for c in (*known, *columns) if c.group == CLOSING), next(iter(columns), None))


def _value(row: Row, column: Column) -> str:
    return f"{row.cells[column].text} %"


def _health(recipes: Sequence[Recipe]) -> str:
    runs = [(recipe, run) for recipe in recipes for run in recipe.runs]
    if len(runs) == 1:
        _, run = runs[0]
        return f"The run {verdict.course(run.history, run.results or {})}."
    unmeasured: dict[str, list[str]] = {}  # without labels: what can be said -> names
    for recipe, run in runs:
        results = run.results or {}
        if results and not recipe.labelled and not results.get("collapsed"):
            said = verdict.course(run.history, results).partition(":")[0]
            unmeasured.setdefault(said, []).append(recipe.name)
    collapsed = [r.name for r, run in runs if (run.results or {}).get("collapsed")]
    unfinished = [r.name for r, run in runs if run.results is None]
    parts = (
        [f"collapsed: {_listed(collapsed)}" if collapsed else "no run collapsed"] if runs else []
    )
    parts += [f"not finished: {_listed(unfinished)}"] if unfinished else []
    parts += [f"{_listed(names)}: {said}" for said, names in unmeasured.items()]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
