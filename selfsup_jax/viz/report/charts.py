"""Layout of the charts, which the template draws as SVG; one unit is about one pixel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 24  # margins of a panel
_MOST_POINTS = 240  # of a curve; a longer one is reduced to the extremes of its segments


class Curve(NamedTuple):
    """A quantity of one run over the steps.

    Attributes:
        steps, values: `[N]` each; the curve has gaps where a value is not finite.
        owner: index of the recipe, which determines the colour.
        name: of the run, shown under the pointer.
        collapsed_at: step of a collapse, which is marked, or None.
        base: value of a dashed line across the panel, or None.
    """

    steps: Sequence[int]
    values: Sequence[float]
    owner: int
    name: str
    collapsed_at: int | None = None
    base: float | None = None


class Tick(NamedTuple):
    """A position on an axis and its text."""

    at: float
    text: str


@dataclasses.dataclass
class Line:
    """A curve as drawn: SVG path, dots (x, y) if it has few points, steps and values as text."""

    owner: int
    name: str
    path: str
    dots: list[tuple[float, float]]
    steps: str
    values: str
    mark: float | None
    base: float | None


@dataclasses.dataclass
class Panel:
    """A small chart; `last` is the step at the right edge."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    last: float


def panel(title: str, curves: Sequence[Curve], last: float, *, percent: bool, log: bool) -> Panel:
    """Lays out curves over steps 0 to `last`.

    Args:
        title: of the panel.
        curves: at least one of them has a finite value.
        last: step at the right edge, above 0.
        percent: whether values are fractions, to be shown in per cent.
        log: whether to use a log axis, if values are positive and span more than a factor of 5.
    """
    factor = 100 if percent else 1
    thinned = [_thin(c.steps, [factor * v for v in c.values]) for c in curves]
    bases = [factor * c.base if c.base is not None else None for c in curves]
    values = [v for _, vs in thinned for v in vs if math.isfinite(v)]
    values += [b for b in bases if b is not None]
    low, high = min(values), max(values)
    if log and low > 0 and high > 5 * low:
        ticks, scale = _log_ticks(low, high), math.log10
    else:
        ticks, scale = nice_ticks(low, high), float
    bottom, top = _padded(scale(low), scale(high))

    def x(step: float) -> float:
        return round(LEFT + step / last * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (scale(value) - bottom) / (top - bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    lines = []
    for curve, (steps, series), base in zip(curves, thinned, bases, strict=True):
        points = [
            (x(s), y(v) if math.isfinite(v) else None) for s, v in zip(steps, series, strict=True)
        ]
        lines.append(
            Line(
                owner=curve.owner,
                name=curve.name,
                path=_path(points),
                dots=[(px, py) for px, py in points if py is not None] if len(points) <= 12 else [],
                steps=",".join(str(s) for s in steps),
                values=",".join(f"{v:.4g}" if math.isfinite(v) else "" for v in series),
                mark=x(curve.collapsed_at) if curve.collapsed_at is not None else None,
                base=y(base) if base is not None else None,
            )
        )
    inside = [Tick(y(t), short(t)) for t in ticks if bottom <= scale(t) <= top]
    across = [Tick(x(t), short(t)) for t in nice_ticks(0, last) if t <= last]
    return Panel(title, lines, across, inside, last)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover low to high; only `low` if both are equal."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, number = math.floor(low / step), math.ceil(high / step) - math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(number + 1)]


def short(x: float) -> str:
    """A number as axis text: `1500` -> `1.5k`, `0.00015` -> `1.5e-4`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.4g}{letter}"
    if 0 < abs(x) < 1e-3:
        digits, _, power = f"{x:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{x:.4g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 50 * low else (1,)
    spacing = math.ceil(len(decades) / 6)
    return [f * 10.0**d for d in decades if d % spacing == 0 for f in factors]


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Keeps about `_MOST_POINTS` points: the smallest and the largest value of each segment."""
    n = len(steps)
    if n <= _MOST_POINTS:
        return list(steps), list(values)
    kept = {0, n - 1}
    segments = _MOST_POINTS // 2
    for i in range(segments):
        segment = range(i * n // segments, (i + 1) * n // segments)
        finite = [j for j in segment if math.isfinite(values[j])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(segment):  # keeps the gap in the curve
            kept.add(next(j for j in segment if not math.isfinite(values[j])))
    order = sorted(kept)
    return [steps[j] for j in order], [values[j] for j in order]


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    parts, drawing = [], False
    for x, y in points:
        if y is not None:
            parts.append(f"{'L' if drawing else 'M'}{x:g} {y:g}")
        drawing = y is not None
    return "".join(parts)


# ----------------------------------------------------------------------------- dot charts


class DotRow(NamedTuple):
    """A recipe's values of a measure and, by name, its baselines, all in [0, 1]."""

    owner: int
    name: str
    values: Sequence[float]
    mean: float
    std: float | None
    text: str
    baselines: dict[str, float]


@dataclasses.dataclass
class Dots:
    """A small chart of one measure: a row for each recipe, x positions from 0 to 100."""

    title: str
    rows: list[dict]
    ticks: list[Tick]


def dots(title: str, rows: Sequence[DotRow]) -> Dots:
    """Lays out a measure's rows on a common axis, in per cent, that covers all their values."""
    shown = [v for r in rows for v in (*r.values, *r.baselines.values())]
    ticks = nice_ticks(100 * min(shown), min(100.0, 100 * max(shown)), 4)
    low, high = ticks[0], max(ticks[-1], ticks[0] + 1)

    def x(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (100 * value - low) / (high - low))), 2)

    drawn = [
        {
            "owner": row.owner,
            "name": row.name,
            "text": row.text,
            "seeds": [x(v) for v in row.values] if len(row.values) > 1 else [],
            "mean": x(row.mean),
            "whisker": [x(row.mean - row.std), x(row.mean + row.std)] if row.std else None,
            "baselines": [(name, x(v), f"{100 * v:.1f}") for name, v in row.baselines.items()],
        }
        for row in rows
    ]
    return Dots(title, drawn, [Tick(x(t / 100), short(t)) for t in ticks])
