"""Which curves the page shows: what the runs logged, and what jobs found at their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfsup_jax.viz.report.charts import Curve, Panel, panel
from selfsup_jax.viz.report.files import fraction
from selfsup_jax.viz.report.recipes import Recipe, collapsed_at
from selfsup_jax.viz.report.records import Job
from selfsup_jax.viz.report.series import Owners, run_name
from selfsup_jax.viz.report.titles import group_labels, measure_title, measures, rank

# Quantity -> title of its panel, in the order of the panels; values with % are fractions. `a/b`
# stands beside `a`. A quantity that isn't here comes last, under its own name.
_TITLES = {
    "loss": "loss",
    "knn_top1": "kNN top-1, %",
    "probe_top1": "online probe top-1, %",
    "projection_std": "projection std (1 healthy, 0 collapsed)",
    "effective_rank": "effective rank",
    "learning_rate": "learning rate",
    "probe_loss": "loss of the online probe",
    "contrast_top1": "own view found first, %",
    "prediction_target_cosine": "cosine of prediction and target",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "grad_norm": "gradient norm",
    "update_norm": "update norm",
    "target_distance": "target distance, relative",
    "tau": "tau",
}
_FIRST = 6  # quantities that are shown at once; the others behind a click
_LOG = ("grad_norm", "update_norm", "target_distance")


def learning(recipes: Sequence[Recipe]) -> tuple[list[Panel], list[Panel]]:
    """Panels of what the runs logged: those that everyone looks at, and the others."""
    order = {name: i for i, name in enumerate(_TITLES)}
    curves: dict[str, list[Curve]] = {}
    for i, recipe in enumerate(recipes):
        for run in recipe.runs:
            for quantity, (steps, values) in run.history.items():
                if any(math.isfinite(v) for v in values):
                    name = run_name(recipe, run)
                    curve = Curve(steps, values, i, name, collapsed_at(run))
                    curves.setdefault(quantity, []).append(curve)
    last = max((step for cs in curves.values() for c in cs for step in c.steps), default=0)
    last = max([last, *(c.collapsed_at or 0 for cs in curves.values() for c in cs), 1])
    first: list[Panel] = []
    others: list[Panel] = []
    for quantity in sorted(curves, key=lambda q: (order.get(q.partition("/")[0], len(order)), q)):
        stem, _, part = quantity.partition("/")
        title = _TITLES.get(stem, stem.replace("_", " ")) + (f": {part}" if part else "")
        drawn = panel(title, curves[quantity], last, percent="%" in title, log=stem in _LOG)
        (first if order.get(stem, len(order)) < _FIRST else others).append(drawn)
    return first, others


def watched(jobs: Sequence[Job], owners: Owners) -> list[tuple[str, list[Panel]]]:
    """(kind of evaluation, panels) of jobs that looked at more than one checkpoint.

    Args:
        jobs: that are given.
        owners: of what they evaluated.
    """
    watching = [job for job in jobs if len(job.by_step) > 1]
    labels = group_labels(watching)
    last = max((step for job in watching for step, _ in job.by_step), default=0) or 1
    found: dict[str, dict[str, list[Curve]]] = {}
    titles: dict[tuple[str, str], str] = {}
    for job in watching:
        label = labels[job.path]
        owner, name = owners.number(job), owners.name(job)
        for measure in dict.fromkeys(m for _, results in job.by_step for m in measures(results)):
            points = [(step, fraction(results.get(measure))) for step, results in job.by_step]
            steps = [step for step, value in points if value is not None]
            values = [value for _, value in points if value is not None]
            base = fraction((job.results or {}).get(f"random_init_{measure}"))
            curve = Curve(steps, values, owner, name, base=base)
            found.setdefault(label, {}).setdefault(measure, []).append(curve)
            metric = job.by_step[-1][1].get(f"{measure}_metric")
            titles[label, measure] = measure_title(measure, label, metric) + ", %"
    return [
        (
            label,
            [
                panel(titles[label, measure], curves[measure], last, percent=True, log=False)
                for measure in sorted(curves, key=rank)
            ],
        )
        for label, curves in found.items()
    ]
