"""Probes of frozen features: linear probe, nearest neighbours, few labels.

The evaluation at the end of a run and the evaluation jobs use the same functions. All hosts must
call them: each has its part of the features, and all come to the same results.
Hyperparameters are chosen on held-out *training* rows; the test set is evaluated once.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from selfsup_jax.devices import hosts
from selfsup_jax.devices.table import as_table
from selfsup_jax.evaluation import knn, logistic, scores
from selfsup_jax.evaluation.features import Features
from selfsup_jax.run.progress import log


class Measured(NamedTuple):
    """The result of a probe.

    Attributes:
        results: flat; accuracies are fractions in [0, 1].
        logits: `[N, C]` of the test images, for the confusion matrix; or None.
    """

    results: dict[str, Any]
    logits: np.ndarray | None = None


def held_out_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A mask `[N]` of about `count` rows, at most a fifth of all, stratified by class."""
    count = min(count, len(labels) // 5)
    mask = np.zeros(len(labels), bool)
    if count:
        rows = np.arange(len(labels))
        split = functools.partial(train_test_split, rows, test_size=count, random_state=seed)
        try:
            _, held = split(stratify=labels if labels.ndim == 1 else None)
        except ValueError:  # a class with a single image cannot be stratified
            _, held = split()
        mask[held] = True
    return mask


def best_of(
    values: Sequence[Any], top1: Callable[[], Sequence[float]], shown: Callable[[Any], str]
) -> tuple[Any, float | None]:
    """(The value with the best held-out top-1, its top-1); for a single value, (the value, None).

    Args:
        values: the candidates.
        top1: returns the top-1 of each; not called for a single value.
        shown: formats a value for the log.
    """
    if len(values) == 1:
        return values[0], None
    accuracies = top1()
    # Hosts of different processors may round differently; all must go on with the same value.
    best = values[hosts.of_first("the best value", int(np.argmax(accuracies)))]
    shown_values = (f"{shown(v)}: {100 * t:.1f} %" for v, t in zip(values, accuracies, strict=True))
    log(f"held-out top-1: {', '.join(shown_values)}; chosen: {shown(best)}")
    return best, max(accuracies)


def linear(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    C: Sequence[float],
    held_out_images: int,
    seed: int,
    standardize: bool = True,
    max_iterations: int = 200,
    tolerance: float = 1e-3,
) -> Measured:
    """Logistic regression: chooses one of several L2 strengths, then fits it to all rows.

    Args:
        train, test: features and labels.
        num_classes: the number of classes.
        C: scikit-learn's inverse L2 strengths.
        held_out_images: number of training rows for the choice, at most a fifth of all.
        seed: for the draw of these rows.
        standardize, max_iterations, tolerance: see `logistic.fit`.
    """
    fit = functools.partial(
        logistic.fit,
        train,
        num_classes,
        standardize=standardize,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    held = held_out_rows(train.labels, held_out_images, seed)
    # The largest of equally good values is chosen; the middle one where there is nothing to test.
    values = sorted(C, reverse=True) if held.any() else [sorted(C)[len(C) // 2]]

    def top1() -> list[float]:
        heads = fit(values, weights=(~held).astype(np.float32))
        logits = heads.logits(train.x[held])
        return [scores.top_k(head_logits, train.labels[held], 1) for head_logits in logits]

    best, chosen = best_of(values, top1, lambda value: f"C {value:g}")
    logits = fit((best,)).logits(test.x)[0]
    results: dict[str, Any] = scores.named("linear_probe", logits, test.labels)
    if chosen is not None:
        results["linear_probe_top1_held_out"] = chosen
    return Measured(results | {"linear_probe_C": best}, logits)


def nearest_neighbours(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    k: Sequence[int],
    temperatures: Sequence[float],
    held_out_images: int,
    seed: int,
    **memory: int,
) -> Measured:
    """Weighted nearest neighbours, with the best of several k and temperatures.

    Args:
        train, test, num_classes, held_out_images, seed: see `linear`.
        k: numbers of neighbours; limited to the number of training rows.
        temperatures: see `knn.vote`.
        memory: `bank_rows`, `query_rows` of `knn.nearest`.
    """
    held = held_out_rows(train.labels, held_out_images, seed)
    pairs = list(itertools.product(k, temperatures))

    bank = as_table(train.x)  # placed once for both searches

    def votes(rows: np.ndarray, queries: Any, pairs: Sequence[Any]) -> list[np.ndarray]:
        most = min(max(k for k, _ in pairs), int(rows.sum()))
        neighbours = knn.nearest(bank, queries, most, rows=rows, **memory)
        labels = train.labels
        return [knn.vote(neighbours, labels, num_classes, k=k, temperature=t) for k, t in pairs]

    def top1() -> list[float]:
        held_out_votes = votes(~held, bank[held], pairs)
        return [scores.top_k(vote, train.labels[held], 1) for vote in held_out_votes]

    best, chosen = best_of(
        pairs if held.any() else pairs[:1], top1, lambda pair: "k {} T {:g}".format(*pair)
    )
    vote = votes(np.ones(len(train.x), bool), test.x, [best])[0]
    results: dict[str, Any] = scores.named("knn", vote, test.labels)
    if chosen is not None:
        results["knn_top1_held_out"] = chosen
    used = {"knn_k": min(best[0], len(train.x)), "knn_temperature": best[1]}
    return Measured(results | used, vote)


def knn_of_run(
    train: Features, test: Features, num_classes: int, config: Any, seed: int = 0
) -> Measured:
    """`nearest_neighbours` with the one k and temperature of a run's section `eval`."""
    k, temperatures = (config.knn_k,), (config.knn_temperature,)
    choice: dict[str, Any] = {"k": k, "temperatures": temperatures, "held_out_images": 0}
    return nearest_neighbours(train, test, num_classes, seed=seed, **choice)


_BLOCK = 4096  # rows of which the features are on every host at once


def _fitted(model: LogisticRegression, x: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    # More threads only get in each other's way: with 768 features, 30 times the CPU time.
    with threadpool_limits(1), warnings.catch_warnings():
        # The iteration limit is intended: the early stop costs a few hundredths of a point.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # scikit-learn takes a few labels of many classes for a regression problem.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        return model.fit(x, labels)


class FewLabels(NamedTuple):
    """Accuracy over the draws, as fractions in [0, 1]."""

    top1: float
    std: float
    ci95: float  # half the 95 % confidence interval of the mean, Student's t


def few_labels(
    train: Features,
    test: Features,
    *,
    labels_per_class: int,
    draws: int,
    seed: int = 0,
    C: float = 1.0,
) -> FewLabels:
    """Logistic regression on `labels_per_class` labelled images of each class, over several draws.

    The features are standardised with the whole training set, which needs no labels. The strength
    is fixed, since there are too few labels to choose it. A class with fewer images uses them all.
    """
    mean, scale = logistic.moments(train.x)
    models = []
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        classes = [np.flatnonzero(train.labels == label) for label in np.unique(train.labels)]
        rows = np.concatenate([rng.permutation(indices)[:labels_per_class] for indices in classes])
        x = (train.x[rows] - mean) / scale
        models.append(_fitted(LogisticRegression(C=C, max_iter=200), x, train.labels[rows]))
    right = np.zeros(draws)
    for start in range(0, len(test.x), _BLOCK):
        x = (test.x[start : start + _BLOCK] - mean) / scale
        labels = test.labels[start : start + _BLOCK]
        right += [np.sum(model.predict(x) == labels) for model in models]
    accuracies = right / len(test.x)
    interval = 0.0
    if draws > 1:
        interval = float(stats.sem(accuracies) * stats.t.ppf(0.975, draws - 1))
    return FewLabels(float(np.mean(accuracies)), float(np.std(accuracies)), interval)
