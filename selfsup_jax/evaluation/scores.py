"""Scores of predictions, and files with the scores of each class."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from sklearn.metrics import confusion_matrix

from selfsup_jax import paths
from selfsup_jax.run.files import whole_file
from selfsup_jax.viz import plots


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of rows whose label is among the k largest of `[N, C]`; a tie counts as larger."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    # The rank is the number of classes whose logit is not lower; so NaN is never correct.
    rank = np.sum(~(logits < own), axis=1)
    return float(np.mean(rank <= k))


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, top-5 (if there are more than five classes) and mean per-class accuracy.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, below C.
    """
    results = {"top1": top_k(logits, labels, 1)}
    if logits.shape[1] > 5:
        results["top5"] = top_k(logits, labels, 5)
    results["mean_per_class"] = mean_per_class(confusion(logits, labels))
    return results


def named(prefix: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`classification` with prefixed names such as `knn_top1`."""
    return {f"{prefix}_{name}": v for name, v in classification(logits, labels).items()}


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[C, C]` int64: number of images of each class (row) by predicted class (column)."""
    classes = np.arange(logits.shape[1])
    return confusion_matrix(labels, logits.argmax(axis=1), labels=classes).astype(np.int64)


def mean_per_class(matrix: np.ndarray) -> float:
    """The mean of the per-class accuracies, without the classes that have no images."""
    images = matrix.sum(axis=1)
    return float(np.mean(np.diag(matrix)[images > 0] / images[images > 0]))


def voc_map(scores: np.ndarray, labels: np.ndarray) -> float:
    """VOC2007's mean average precision (precision at 11 recalls), over classes with images.

    Args:
        scores: `[N, C]`, higher for more likely.
        labels: `[N, C]` zeros and ones.
    """
    precisions = []
    for score, label in zip(scores.T, labels.T, strict=True):
        if not label.any():
            continue
        hits = np.cumsum(label[np.argsort(-score, kind="stable")])
        precision = hits / np.arange(1, len(hits) + 1)
        recall = hits / hits[-1]
        best = [precision[recall >= r].max() for r in np.linspace(0, 1, 11) - 1e-12]
        precisions.append(np.mean(best))
    return float(np.mean(precisions))


def write_confusion(folder: str, matrix: np.ndarray, class_names: Sequence[str]) -> None:
    """Writes `confusion.npz`, `per_class.csv` and `plots/confusion_matrix.png`.

    Args:
        folder: the folder of a job.
        matrix: see `confusion`.
        class_names: the names of its rows.
    """
    paths.makedirs(folder)
    with whole_file(os.path.join(folder, "confusion.npz"), "wb") as f:
        np.savez_compressed(f, matrix=matrix, class_names=np.asarray(class_names, dtype=str))
    path = os.path.join(folder, "per_class.csv")
    with whole_file(path, newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["class", "images", "accuracy", "most_taken_for", "how_often"])
        table.writerows(_rows(matrix, class_names))
    try:
        picture = os.path.join(folder, "plots", "confusion_matrix.png")
        plots.confusion_matrix(picture, matrix, class_names, title="Confusion matrix")
    except Exception as e:  # a failed plot must not lose the result
        logging.warning("the confusion matrix could not be drawn: %r", e)


def _rows(matrix: np.ndarray, class_names: Sequence[str]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for i, name in enumerate(class_names):
        images = int(matrix[i].sum())
        others = matrix[i].copy()
        others[i] = 0
        worst = int(others.argmax())
        accuracy = f"{matrix[i, i] / images:.4f}" if images else ""
        taken = [class_names[worst], int(others[worst])] if others[worst] else ["", 0]
        rows.append([name, images, accuracy, *taken])
    return rows
