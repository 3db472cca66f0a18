"""Whose a number is, and so its colour: the recipes first, then runs that only jobs tell of."""

from __future__ import annotations

from collections.abc import Sequence

from selfsup_jax.viz.report.recipes import Recipe, shown
from selfsup_jax.viz.report.records import Job, Run


class Owners:
    """The recipes and, after them, what was evaluated though its run is not among those given.

    Args:
        recipes: of the runs that are given.
        jobs: that are given.

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
        """Of the owner of what a job evaluated."""
        where = evaluated(job)
        if where in self._at:
            return self._at[where][0]
        return len(self.recipes) + self._outside.index(where)

    def run(self, job: Job) -> Run | None:
        """The run that a job evaluated, if it is among those given."""
        return self._at[evaluated(job)][1] if evaluated(job) in self._at else None

    def name(self, job: Job) -> str:
        """The owner's, with the run's seed if it has several."""
        number, run = self.number(job), self.run(job)
        if run is None:
            return self.names[number]
        return run_name(self.recipes[number], run)


def run_name(recipe: Recipe, run: Run) -> str:
    """The recipe's, with the run's seed if it has several."""
    return f"{recipe.name}, seed {shown(run.seed)}" if len(recipe.runs) > 1 else recipe.name


def evaluated(job: Job) -> str:
    """Path of the run or, if there is none, of the checkpoint that a job evaluated."""
    return job.run or str(job.tell("checkpoint") or job.path)
