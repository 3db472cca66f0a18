"""The confusion matrix of an evaluation, and its most common mistakes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from selfsup_jax.viz.report.files import Confusion

MOST_DRAWN = 40  # classes; with more, only the lists are shown
_LISTED_PAIRS, _LISTED_CLASSES = 10, 5


@dataclasses.dataclass
class Mistakes:
    """The parts of a confusion matrix that the page shows.

    Attributes:
        names: of the classes, in full.
        labels: the names, shortened for the drawing; empty if the matrix is not drawn.
        size: of a cell of the drawing.
        cells: (column, row, whether it is correct, opacity in [0, 1], count, description).
        pairs: (true, predicted, count, share of the true class in per cent), largest first.
        best, worst: (class, images, accuracy in per cent).
        images, correct: numbers of images.
    """

    names: list[str]
    labels: list[str]
    size: int
    cells: list[tuple[int, int, bool, float, int, str]]
    pairs: list[tuple[str, str, int, str]]
    best: list[tuple[str, int, str]]
    worst: list[tuple[str, int, str]]
    images: int
    correct: int


def mistakes(confusion: Confusion) -> Mistakes:
    """Summarises a confusion matrix; the lists leave out classes without images."""
    matrix, names = confusion.matrix, confusion.names
    totals = matrix.sum(axis=1)
    shares = matrix / np.maximum(totals, 1)[:, None]
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED_PAIRS]
    pairs = [(int(i // len(names)), int(i % len(names))) for i in order if wrong.flat[i]]
    present = [int(i) for i in np.flatnonzero(totals)]
    ranked = sorted(present, key=lambda i: -shares[i, i])
    listed = min(_LISTED_CLASSES, len(ranked) // 2)
    accuracies = [(names[i], int(totals[i]), f"{100 * shares[i, i]:.1f}") for i in ranked]
    drawn = len(names) <= MOST_DRAWN
    return Mistakes(
        names=names,
        labels=[_cut(name) for name in names] if drawn else [],
        size=34 if len(names) <= 12 else 24 if len(names) <= 24 else 18,
        cells=_cells(matrix, shares, names) if drawn else [],
        pairs=[
            (names[i], names[j], int(matrix[i, j]), f"{100 * shares[i, j]:.1f}") for i, j in pairs
        ],
        best=accuracies[:listed],
        worst=accuracies[len(accuracies) - listed :][::-1],
        images=int(matrix.sum()),
        correct=int(np.trace(matrix)),
    )


def _cells(
    matrix: np.ndarray, shares: np.ndarray, names: list[str]
) -> list[tuple[int, int, bool, float, int, str]]:
    """Cells of the drawing: opacity is the share; for mistakes, relative to the largest mistake."""
    off = shares * (1 - np.eye(len(matrix)))
    largest = off.max(initial=0.0) or 1.0
    cells = []
    for i, j in zip(*np.nonzero(matrix), strict=True):
        right = bool(i == j)
        # The square root makes rare mistakes visible.
        strength = shares[i, j] if right else math.sqrt(off[i, j] / largest)
        words = f"{names[i]} → {names[j]}: {matrix[i, j]:,} ({100 * shares[i, j]:.1f} %)"
        cells.append((int(j), int(i), right, round(float(strength), 3), int(matrix[i, j]), words))
    return cells


def _cut(name: str, room: int = 14) -> str:
    name = " ".join(name.split())
    return name if len(name) <= room else name[: room - 1].rstrip() + "…"
