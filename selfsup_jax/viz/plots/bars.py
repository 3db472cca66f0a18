"""Bar charts that compare recipes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from selfsup_jax.viz.plots.page import CURVES, GREY, INK, MARGIN, SMALL, TOP, open_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW, _BAR, _WIDTH = 30, 0.62, 250  # row height in pixels; bar / row; panel width in pixels


class Panel(NamedTuple):
    """One measure for all recipes.

    Attributes:
        heading: the measure and its unit.
        values: for each recipe, one number per run; empty while no run has finished.
        baselines: the same for each recipe's baseline; empty for no baselines.
    """

    heading: str
    values: Sequence[Sequence[float]]
    baselines: Sequence[Sequence[float]]


def comparison(path: str, names: Sequence[str], panels: Sequence[Panel], *, title: str) -> None:
    """Draws for each recipe a bar for the mean, a dot per run and a grey line for the baseline.

    Args:
        path: of the PNG file.
        names: of the recipes, from top to bottom.
        panels: from left to right.
        title: of the figure.
    """
    any_baseline = any(any(panel.baselines) for panel in panels)
    note = "bar: mean; dots: runs" + "; grey line: never trained" * any_baseline
    with open_rows(path, names, [panel.heading for panel in panels], title, note) as all_axes:
        for panel, axes in zip(panels, all_axes, strict=True):
            for row, values in enumerate(panel.values):
                color = CURVES[row % len(CURVES)]
                if values:
                    axes.barh(row, np.mean(values), height=_BAR, color=color, alpha=0.35)
                    axes.plot(values, [row] * len(values), "o", color=color, markersize=4)
                if panel.baselines and panel.baselines[row]:
                    ends = (row - _BAR / 2, row + _BAR / 2)
                    axes.plot([np.mean(panel.baselines[row])] * 2, ends, color=GREY, linewidth=2)
            axes.set_xlim(left=0)


@contextlib.contextmanager
def open_rows(
    path: str, names: Sequence[str], headings: Sequence[str], title: str, note: str
) -> Iterator[list[Axes]]:
    """A page of panels side by side, each with a row for every name; yields their axes."""
    left = MARGIN + 8 + 6 * max(map(len, names))
    height = TOP + 26 + _ROW * len(names) + 40
    width = max(640, left + len(headings) * (_WIDTH + MARGIN) + MARGIN)
    with open_page(path, width, height, title, note) as page:
        all_axes = []
        for number, heading in enumerate(headings):
            x = left + number * (_WIDTH + MARGIN)
            page.write(x, TOP, heading, _WIDTH, ha="left", weight="bold")
            all_axes.append(page.axes(x, TOP + 22, _WIDTH, _ROW * len(names)))
        yield all_axes
        for number, axes in enumerate(all_axes):
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            axes.tick_params(labelsize=SMALL, colors=INK, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
