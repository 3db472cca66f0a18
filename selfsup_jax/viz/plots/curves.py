"""The learning curves of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from selfsup_jax.viz.plots.page import CURVES, GREY, INK, MARGIN, RED, SMALL, TOP, Page, open_page
from selfsup_jax.viz.titles import quantity, quantity_rank
from selfsup_jax.viz.verdict import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TINT = 0.22  # opacity of a reference band


class ReferenceBand(NamedTuple):
    """Mean and range of a quantity over earlier runs, at S steps; arrays `[S]`."""

    steps: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


def learning_curves(
    path: str,
    history: History,
    *,
    title: str,
    reference: Mapping[str, ReferenceBand] | None = None,
    collapsed_at: int | None = None,
) -> None:
    """Draws small panels with a common range of steps, each with one or a few related quantities.

    Args:
        path: of the PNG file.
        history: quantity -> (steps, values).
        title: of the figure.
        reference: quantity -> the band to draw behind its curve.
        collapsed_at: step of a collapse, marked in every panel.
    """
    panels = _panels(history)
    names = [name for members in panels.values() for name in members]
    bands = {name: band for name, band in (reference or {}).items() if name in names}
    ends = [max(history[name][0]) for name in names] + [max(b.steps) for b in bands.values()]
    last = max([*ends, collapsed_at or 0, 1])
    columns = min(4, max(1, len(panels)))
    width, height = columns * 316 + MARGIN, TOP + math.ceil(len(panels) / columns) * 228
    with open_page(path, width, height, title, "" if panels else "nothing is logged yet") as page:
        for i, (panel, members) in enumerate(panels.items()):
            row, column = divmod(i, columns)
            axes = page.axes(column * 316 + 56, TOP + row * 228 + 24, 252, 160)
            heading = page.cut(panel, 252, size=9)
            axes.set_title(heading, size=9, loc="left", color=INK, pad=5, parse_math=False)
            for j, (name, label) in enumerate(members.items()):
                style = {"color": CURVES[j % len(CURVES)], "label": label}
                scale = 100 if "%" in panel else 1
                _draw_curve(axes, history[name], bands.get(name), scale, style)
            _format_panel(
                axes, last, log=all(quantity(name).log for name in members), legend=len(members) > 1
            )
            if collapsed_at is not None:
                _mark_collapse(axes, collapsed_at, last)
        _write_key(page, bool(bands), collapsed_at)


def _panels(history: History) -> dict[str, dict[str, str]]:
    """Panel title -> {quantity: label}, for the quantities that have values."""
    panels: dict[str, dict[str, str]] = {}
    for name in sorted((n for n, (steps, _) in history.items() if len(steps)), key=quantity_rank):
        known = quantity(name)
        label = name.partition("/")[2] or known.label
        panels.setdefault(known.panel or known.title, {})[name] = label
    return panels


def _draw_curve(
    axes: Axes, curve: Any, band: ReferenceBand | None, scale: float, style: dict[str, Any]
) -> None:
    if band is not None:
        low, mean, high = (scale * np.asarray(v) for v in (band.low, band.mean, band.high))
        axes.fill_between(band.steps, low, high, color=style["color"], alpha=_TINT, linewidth=0)
        axes.plot(band.steps, mean, color=style["color"], linewidth=0.6)
    steps, values = (np.asarray(v) for v in curve)
    marker = "o" if len(steps) == 1 else "." if len(steps) <= 30 else ""
    axes.plot(steps, scale * values, linewidth=1.5, marker=marker, **style)


def _format_panel(axes: Axes, last: float, log: bool, legend: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    steps = [1, 2, 2.5, 5, 10]
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    low, high = values.min(), values.max()
    if log and low > 0 and high > 5 * low:  # else there are too few log ticks
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=steps))
    axes.yaxis.set_major_formatter(_format_value)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_xlabel("step", size=SMALL, color=GREY, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=steps, integer=True))
    axes.xaxis.set_major_formatter(_format_value)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    if legend:
        axes.legend(fontsize=SMALL, loc="best", framealpha=0.8, borderpad=0.2, handlelength=1.2)


def _format_value(x: float, _: object = None) -> str:
    """Short form: `1500` -> `1.5k`, `0.00015` -> `1.5e-4`."""
    if abs(x) >= 1e6:
        return f"{x / 1e6:.5g}M"
    if abs(x) >= 1e3:
        return f"{x / 1e3:.5g}k"
    if 0 < abs(x) < 1e-3:
        digits, _, power = f"{x:.4e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{x:.5g}"


def _mark_collapse(axes: Axes, step: int, last: float) -> None:
    from matplotlib.patheffects import withStroke

    side = -1 if step > last / 2 else 1  # the side of the line with more room
    axes.axvline(step, color=RED, linewidth=1.2)
    axes.annotate(
        "collapsed",
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3 * side, -2),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="top",
        rotation=90,
        size=SMALL,
        color=RED,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )


def _write_key(page: Page, reference: bool, collapsed_at: int | None) -> None:
    """Writes the legend of the bands and the red line under the title."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = []
    if reference:
        band = Patch(color=CURVES[0], alpha=_TINT, linewidth=0)
        mean = Line2D([], [], color=CURVES[0], linewidth=0.6)
        entries.append(((band, mean), "reference"))
    if collapsed_at is not None:
        line = Line2D([], [], color=RED, linewidth=1.2)
        entries.append((line, f"collapsed at step {collapsed_at:,}"))
    page.legend(MARGIN, 36, entries, columns=2)
