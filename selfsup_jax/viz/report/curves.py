"""The curves on the page: quantities that runs logged, and measures at each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from selfsup_jax.viz.report.charts import Curve, Panel, panel
from selfsup_jax.viz.report.measures import knn_settings
from selfsup_jax.viz.report.recipes import Recipe, collapsed_at
from selfsup_jax.viz.report.records import Job, Run
from selfsup_jax.viz.report.series import Owners, group_labels, run_name
from selfsup_jax.viz.titles import fraction, measure_title, measures, quantity, quantity_rank, rank

_FIRST = 6  # quantities that are always visible; the others are folded


def learning(recipes: Sequence[Recipe]) -> tuple[list[Panel], list[Panel]]:
    """Panels of the quantities that the runs logged: (the first `_FIRST`, the others)."""
    curves: dict[tuple[str, str], list[Curve]] = {}  # by quantity and, of losses, method
    several = len({recipe.method for recipe in recipes}) > 1
    for i, recipe in enumerate(recipes):
        for run in recipe.runs:
            for name, (steps, values) in run.history.items():
                if any(math.isfinite(v) for v in values):
                    curve = Curve(steps, values, i, run_name(recipe, run), collapsed_at(run))
                    # Losses of different methods are different quantities.
                    method = recipe.method if several and name == "loss" else ""
                    curves.setdefault((name, method), []).append(curve)
    knn = knn_settings([_knn_fields(run) for recipe in recipes for run in recipe.runs])
    last = max((step for cs in curves.values() for c in cs for step in c.steps), default=0)
    last = max([last, *(c.collapsed_at or 0 for cs in curves.values() for c in cs), 1])
    first: list[Panel] = []
    others: list[Panel] = []
    for name, method in sorted(curves, key=lambda key: (quantity_rank(key[0]), *key)):
        known, part = quantity(name), name.partition("/")[2] or method
        title = known.title
        if name.startswith("knn_"):
            title = f"{title.removesuffix(', %')}{knn}, %"
        title += f": {part}" if part else ""
        drawn = panel(title, curves[name, method], last, percent="%" in title, log=known.log)
        (first if quantity_rank(name) < _FIRST else others).append(drawn)
    return first, others


def _knn_fields(run: Run) -> dict[str, Any]:
    if "knn_top1" not in run.history:
        return {}
    return {f"knn_{name}": run.settings.get(f"eval.knn_{name}") for name in ("k", "temperature")}


def watched(jobs: Sequence[Job], owners: Owners) -> list[tuple[str, list[Panel]]]:
    """(kind of evaluation, panels) of the jobs that evaluated more than one checkpoint.

    Args:
        jobs: all jobs of the report.
        owners: of the evaluated runs.
    """
    followers = [job for job in jobs if len(job.by_step) > 1]
    labels = group_labels(followers)
    last = max((step for job in followers for step, _ in job.by_step), default=0) or 1
    by_label: dict[str, dict[str, list[Curve]]] = {}
    titles: dict[tuple[str, str], str] = {}
    for job in followers:
        label = labels[job.path]
        owner, name = owners.number(job), owners.name(job)
        for measure in dict.fromkeys(m for _, results in job.by_step for m in measures(results)):
            points = [(step, fraction(results.get(measure))) for step, results in job.by_step]
            steps = [step for step, value in points if value is not None]
            values = [value for _, value in points if value is not None]
            base = fraction((job.results or {}).get(f"random_init_{measure}"))
            curve = Curve(steps, values, owner, name, base=base)
            by_label.setdefault(label, {}).setdefault(measure, []).append(curve)
            metric = job.by_step[-1][1].get(f"{measure}_metric")
            knn = [r for _, r in job.by_step[-1:]] if measure.startswith("knn_") else []
            title = measure_title(measure, label, metric) + knn_settings(knn)
            titles[label, measure] = f"{title}, %"
    return [
        (
            label,
            [
                panel(titles[label, measure], curves[measure], last, percent=True, log=False)
                for measure in sorted(curves, key=rank)
            ],
        )
        for label, curves in by_label.items()
    ]
