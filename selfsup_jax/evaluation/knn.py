"""Weighted nearest neighbours: Wu et al. 2018 (arXiv 1805.01978), section 3.4."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.preprocessing import normalize

from selfsup_jax.devices import parallel
from selfsup_jax.evaluation.features import Features


class Neighbours(NamedTuple):
    """The nearest of a bank, nearest first; of equally near ones the first in the bank."""

    cosine: np.ndarray  # [Q, k] float32
    rows: np.ndarray  # [Q, k] int32, places in the bank


def nearest(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    bank_rows: int = 8192,
    query_rows: int = 1024,
) -> Neighbours:
    """The k nearest rows of the bank by cosine, exactly.

    Each of this host's devices holds its part of the bank, `N / devices x D` float32, and looks at
    `bank_rows` of it for `query_rows` queries at a time: beside the bank it needs memory for
    `query_rows x (bank_rows + 4 k)` numbers, however large the bank is.

    Args:
        bank: `[N, D]` float32; need not be of unit length.
        queries: `[Q, D]` float32.
        k: at most N.
        bank_rows, query_rows: of one look.
    """
    parts = parallel.spread_rows(normalize(bank), bank_rows)
    look = _look(k)
    cosines, indices = [], []
    for start in range(0, len(queries), query_rows):
        rows = normalize(queries[start : start + query_rows])
        count = len(rows)
        if start:  # one trace for all: the last look is filled up
            rows = np.pad(rows, ((0, query_rows - count), (0, 0)))
        found = look(parts, rows)  # [devices, q, k] each
        cosine, index = (np.concatenate(np.asarray(x), axis=-1)[:count] for x in found)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        cosines.append(np.take_along_axis(cosine, order, axis=1))
        indices.append(np.take_along_axis(index, order, axis=1))
    return Neighbours(np.concatenate(cosines), np.concatenate(indices))


@functools.cache  # so that the same k is compiled once
def _look(k: int) -> Callable:
    return parallel.pmap_parts(functools.partial(_nearest_of_part, k=k))


def _nearest_of_part(
    part: parallel.RowsPart, queries: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and rows `[Q, k]` of a device's part of the bank; -inf where it holds fewer."""

    def look(best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]):
        rows, numbers = block  # [c, D], [c]: -1 for what only fills up
        cosine = jnp.dot(queries, rows.T, precision=lax.Precision.HIGHEST)  # [Q, c]
        cosine = jnp.where(numbers >= 0, cosine, -jnp.inf)
        cosine, place = lax.top_k(cosine, min(k, len(numbers)))
        joined = jnp.concatenate([best[0], cosine], axis=1)
        index = jnp.concatenate([best[1], numbers[place]], axis=1)
        cosine, place = lax.top_k(joined, k)
        return (cosine, jnp.take_along_axis(index, place, axis=1)), None

    size = (len(queries), k)
    nothing = (jnp.full(size, -jnp.inf), jnp.full(size, -1, jnp.int32))
    return lax.scan(look, nothing, (part.rows, part.numbers))[0]


def vote(
    neighbours: Neighbours, labels: np.ndarray, num_classes: int, *, k: int, temperature: float
) -> np.ndarray:
    """Class votes `[Q, classes]` of the first k neighbours, each exp(cosine / T).

    Args:
        neighbours: at least k of each query.
        labels: `[N]`, the bank's.
        num_classes: C.
        k: how many vote.
        temperature: T.
    """
    cosine = neighbours.cosine[:, :k]
    # Divided by the largest, so that it can't overflow.
    weights = np.exp((cosine - cosine[:, :1]) / temperature)
    first = np.arange(len(cosine))[:, None] * num_classes
    places = first + labels[neighbours.rows[:, :k]]
    votes = np.bincount(places.ravel(), weights.ravel(), minlength=len(cosine) * num_classes)
    return votes.reshape(-1, num_classes)


def knn_accuracy(
    train: Features, test: Features, *, k: int = 200, temperature: float = 0.1
) -> float:
    """Top-1 of the k nearest training features by cosine, votes weighted by exp(cosine / T).

    Args:
        train: the bank; its labels vote.
        test: the queries.
        k: neighbours; of a smaller bank all.
        temperature: T.

    Returns:
        A fraction in [0, 1].
    """
    k = min(k, len(train.x))
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    found = nearest(train.x, test.x, k)
    votes = vote(found, train.labels, num_classes, k=k, temperature=temperature)
    return float(np.mean(votes.argmax(axis=1) == test.labels))
