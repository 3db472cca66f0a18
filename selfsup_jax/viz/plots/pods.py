"""The plot of several pods: hours and chip-hours of a planned run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfsup_jax.viz.plots.bars import open_rows
from selfsup_jax.viz.plots.page import CURVES, GREY, INK, SMALL


def draw(path: str, plans: Sequence[dict[str, Any]]) -> None:
    """Draws a bar for each plan of `selfsup_jax/plan`: milliseconds a step, hours, chip-hours.

    Args:
        path: of the PNG file.
        plans: from top to bottom; those that do not fit have no bars.
    """
    panels = {
        "at least ms a step": [1e3 * plan.get("step_seconds_lower_bound", 0) for plan in plans],
        "at least hours": [plan.get("hours", 0) for plan in plans],
        "at least chip-hours": [plan.get("chip_hours", 0) for plan in plans],
    }
    names = [f"{plan['pod']}, {plan['batch_per_chip']} a chip" for plan in plans]
    title = "What the run takes on each pod"
    note = "lower bounds, from compiled programs and the chips' published rates"
    with open_rows(path, names, list(panels), title, note) as all_axes:
        for axes, values, color in zip(all_axes, panels.values(), CURVES, strict=False):
            for row, value in enumerate(values):
                axes.barh(row, value, height=0.62, color=color, alpha=0.5)
                text = f" {value:,.4g}" if value else " does not fit"
                axes.text(value, row, text, va="center", size=SMALL, color=INK if value else GREY)
            axes.set_xlim(0, 1.3 * max(values) or 1)
