"""The plot of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfsup_jax.viz.plots.page import GREY, INK, MARGIN, SMALL, TOP, open_page

_NAMED = 40  # up to this many classes, each has its name
_SIDE = 560  # minimum, in pixels


def confusion_matrix(
    path: str, matrix: np.ndarray, class_names: Sequence[str], *, title: str
) -> None:
    """Draws a confusion matrix as shares of its rows: rows true classes, columns predictions.

    Args:
        path: of the PNG file.
        matrix: `[C, C]` counts.
        class_names: `[C]`.
        title: of the figure.
    """
    classes = len(matrix)
    images = matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(images, 1)
    overall = np.trace(matrix) / max(1, matrix.sum())
    named = classes <= _NAMED
    side = max(_SIDE, 30 * classes) if named else _SIDE + 240
    left = MARGIN + (130 if named else 30)
    below = 120 if named else 40
    note = f"rows: true class, columns: predicted, share of the row; {100 * overall:.1f} % right"
    width, height = left + side + MARGIN, TOP + side + below
    with open_page(path, width, height, title, note) as page:
        axes = page.axes(left, TOP + 8, side, side)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.tick_params(labelsize=SMALL, colors=INK, length=0)
        axes.spines[:].set_color(GREY)
        if not named:
            axes.set(xticks=[], yticks=[])
            return
        names = [page.cut(name, 120) for name in class_names]
        axes.set_yticks(range(classes), names)
        axes.set_xticks(range(classes), names, rotation=60, ha="right", rotation_mode="anchor")
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_parse_math(False)
        if classes > 20:
            return
        for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
            color = "white" if share[row, column] > 0.55 else INK
            value = f"{100 * share[row, column]:.0f}"
            axes.text(column, row, value, ha="center", va="center", size=SMALL, color=color)
