"""The plot of several pods: hours and chip-hours of a planned run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfsup_jax.viz.plots.page import CURVES, GREY, INK, MARGIN, SMALL, TOP, open_page

_ROW, _WIDTH = 30, 250  # row height and panel width in pixels


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
    left = MARGIN + 8 + 6 * max(map(len, names))
    height, width = TOP + 26 + _ROW * len(plans) + 40, left + 3 * (_WIDTH + MARGIN) + MARGIN
    note = "lower bounds, from compiled programs and the chips' published rates"
    with open_page(path, width, height, "What the run takes on each pod", note) as page:
        for number, (heading, values) in enumerate(panels.items()):
            x = left + number * (_WIDTH + MARGIN)
            page.write(x, TOP, heading, _WIDTH, ha="left", weight="bold")
            axes = page.axes(x, TOP + 22, _WIDTH, _ROW * len(plans))
            for row, value in enumerate(values):
                axes.barh(row, value, height=0.62, color=CURVES[number], alpha=0.5)
                text = f" {value:,.4g}" if value else " does not fit"
                axes.text(value, row, text, va="center", size=SMALL, color=INK if value else GREY)
            axes.set_ylim(len(plans) - 0.5, -0.5)
            axes.set_xlim(0, 1.3 * max(values) or 1)
            axes.set_yticks(range(len(plans)), names if number == 0 else [""] * len(plans))
            axes.tick_params(labelsize=SMALL, colors=INK, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
