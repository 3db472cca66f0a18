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


class Neighbours(NamedTuple):
    """The nearest rows of a bank, nearest first; ties are in the order of the bank."""

    cosine: np.ndarray  # [Q, k] float32
    rows: np.ndarray  # [Q, k] int32, row indices in the bank


def nearest(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    bank_rows: int = 8192,
    query_rows: int = 1024,
) -> Neighbours:
    """The exact k nearest rows of the bank by cosine similarity.

    Each of this host's devices holds a shard of the bank, `N / devices x D` float32, and compares
    `bank_rows` of it with `query_rows` queries at a time. Besides the bank it needs memory for
    `query_rows x (bank_rows + 4 k)` numbers, for any size of the bank.

    Args:
        bank: `[N, D]` float32; the rows need not have unit length.
        queries: `[Q, D]` float32.
        k: at most N.
        bank_rows, query_rows: the block sizes.
    """
    parts = parallel.shard_rows(normalize(bank), bank_rows)
    search = _search(k)
    cosines, indices = [], []
    for start in range(0, len(queries), query_rows):
        rows = normalize(queries[start : start + query_rows])
        count = len(rows)
        if start:  # pad the last block, so that all blocks share one trace
            rows = np.pad(rows, ((0, query_rows - count), (0, 0)))
        neighbours = search(parts, rows)  # [devices, q, k] each
        cosine, index = (np.concatenate(np.asarray(x), axis=-1)[:count] for x in neighbours)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        cosines.append(np.take_along_axis(cosine, order, axis=1))
        indices.append(np.take_along_axis(index, order, axis=1))
    return Neighbours(np.concatenate(cosines), np.concatenate(indices))


@functools.cache  # each k is compiled only once
def _search(k: int) -> Callable:
    return parallel.pmap_parts(functools.partial(_nearest_of_part, k=k))


def _nearest_of_part(
    part: parallel.RowsPart, queries: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and rows `[Q, k]` of a device's shard of the bank; -inf if it has fewer than k."""

    def search_block(best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]):
        rows, indices = block  # [c, D], [c]: -1 for padding rows
        cosine = jnp.dot(queries, rows.T, precision=lax.Precision.HIGHEST)  # [Q, c]
        cosine = jnp.where(indices >= 0, cosine, -jnp.inf)
        cosine, position = lax.top_k(cosine, min(k, len(indices)))
        joined = jnp.concatenate([best[0], cosine], axis=1)
        index = jnp.concatenate([best[1], indices[position]], axis=1)
        cosine, position = lax.top_k(joined, k)
        return (cosine, jnp.take_along_axis(index, position, axis=1)), None

    size = (len(queries), k)
    start = (jnp.full(size, -jnp.inf), jnp.full(size, -1, jnp.int32))
    return lax.scan(search_block, start, (part.rows, part.indices))[0]


def vote(
    neighbours: Neighbours, labels: np.ndarray, num_classes: int, *, k: int, temperature: float
) -> np.ndarray:
    """Class votes `[Q, classes]` of the first k neighbours; each has the weight exp(cosine / T).

    Args:
        neighbours: at least k for each query.
        labels: `[N]`, those of the bank.
        num_classes: the number of classes.
        k: number of neighbours that vote.
        temperature: T.
    """
    cosine = neighbours.cosine[:, :k]
    # Divided by the largest weight, to avoid an overflow.
    weights = np.exp((cosine - cosine[:, :1]) / temperature)
    first = np.arange(len(cosine))[:, None] * num_classes
    bins = first + labels[neighbours.rows[:, :k]]
    votes = np.bincount(bins.ravel(), weights.ravel(), minlength=len(cosine) * num_classes)
    return votes.reshape(-1, num_classes)
