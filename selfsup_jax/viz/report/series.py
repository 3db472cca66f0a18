"""Owners of results, which set their colours: recipes, then runs that only jobs refer to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from selfsup_jax.run import identity
from selfsup_jax.viz.report.recipes import Recipe, shown
from selfsup_jax.viz.report.records import Job, Run
from selfsup_jax.viz.titles import KINDS


class Owners:
    """The recipes and, after them, evaluated runs and checkpoints outside the recipes.

    Args:
        recipes: of the runs of the report.
        jobs: of the report.

    Attributes:
        recipes: as given.
        names: of all owners, in order.
    """

    def __init__(self, recipes: Sequence[Recipe], jobs: Sequence[Job]):
        self.recipes = recipes
        self._at = {run.path: (i, run) for i, r in enumerate(recipes) for run in r.runs}
        outside = dict.fromkeys(evaluated(job) for job in jobs)
        self._outside = [where for where in outside if where not in self._at]
        ends = [where.rstrip("/").rpartition("/")[2] for where in self._outside]
        pairs = zip(ends, self._outside, strict=True)
        own = [end if end and ends.count(end) == 1 else where for end, where in pairs]
        self.names = [recipe.name for recipe in recipes] + own

    def number(self, job: Job) -> int:
        """Index of the owner of the run or checkpoint that a job evaluated."""
        where = evaluated(job)
        if where in self._at:
            return self._at[where][0]
        return len(self.recipes) + self._outside.index(where)

    def run(self, job: Job) -> Run | None:
        """The run that a job evaluated, if it belongs to a recipe; else None."""
        return self._at[evaluated(job)][1] if evaluated(job) in self._at else None

    def name(self, job: Job) -> str:
        """The owner's name, with the run's seed if the recipe has several runs."""
        number, run = self.number(job), self.run(job)
        if run is None:
            return self.names[number]
        return run_name(self.recipes[number], run)


def run_name(recipe: Recipe, run: Run) -> str:
    """The recipe's name, with the run's seed if the recipe has several runs."""
    return f"{recipe.name}, seed {shown(run.seed)}" if len(recipe.runs) > 1 else recipe.name


def evaluated(job: Job) -> str:
    """Path of the run that a job evaluated or, without a run, of the checkpoint."""
    return job.run or str(job.get("checkpoint") or job.path)


# ------------------------------------------------------------------- labels of jobs

_MOST_FIELDS = 3  # in a label; if jobs differ in more fields, their folder names are used


def group_rank(label: str) -> tuple[int, str]:
    """Sort key of job labels: the order of `KINDS`."""
    titles = list(KINDS.values())
    return next((i for i, t in enumerate(titles) if label.startswith(t)), len(titles)), label


def group_labels(jobs: Sequence[Job]) -> dict[str, str]:
    """Path of a job -> its label. Jobs with different configs have different labels."""
    labels: dict[str, str] = {}
    for kind in dict.fromkeys(job.kind for job in jobs):
        name = KINDS.get(kind, kind.replace("_", " "))
        configs = {
            job.path: identity.bound(job.settings, identity.SAME_MEASURE)
            for job in jobs
            if job.kind == kind
        }
        alike: dict[str, list[str]] = {}  # a config -> the jobs that have it
        for path, config in configs.items():
            key = json.dumps(sorted(config.items()), default=str)
            alike.setdefault(key, []).append(path)
        unique = [configs[paths[0]] for paths in alike.values()]
        fields = sorted({field for config in unique for field in config})
        differ = [f for f in fields if any(c.get(f) != unique[0].get(f) for c in unique)]
        if "data.name" in differ and len({str(c.get("data.name")) for c in unique}) == len(unique):
            differ = ["data.name"]  # enough to distinguish them
        for paths in alike.values():
            config = configs[paths[0]]
            detail = ", ".join(f"{f.rpartition('.')[2]} {shown(config.get(f))}" for f in differ)
            if differ == ["data.name"]:
                detail = shown(config.get("data.name"))
            elif len(differ) > _MOST_FIELDS:
                detail = os.path.basename(paths[0])
            labels |= dict.fromkeys(paths, f"{name} ({detail})" if detail else name)
    return labels
