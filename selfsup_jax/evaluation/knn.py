"""Weighted nearest neighbours: Wu et al. 2018 (arXiv 1805.01978), section 3.4."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from selfsup_jax.devices import collectives, parallel
from selfsup_jax.devices.table import Part, Table, as_table, scan_blocks


class Neighbours(NamedTuple):
    """The nearest rows of a bank, nearest first; ties are in the order of the bank."""

    cosine: np.ndarray  # [Q, k] float32
    rows: np.ndarray  # [Q, k] int32, row indices in the bank


def nearest(
    bank: np.ndarray | Table,
    queries: np.ndarray | Table,
    k: int,
    *,
    rows: np.ndarray | None = None,
    bank_rows: int = 8192,
    query_rows: int = 1024,
) -> Neighbours:
    """The exact k nearest rows of the bank by cosine similarity; all hosts must call it.

    Each device of each host holds a part of the bank, `N / devices x D` float32, and compares
    `bank_rows` of it with `query_rows` queries at a time. The nearest of each part, k a query, are
    then sent to all devices, which choose among them. Besides the bank a device needs memory for
    `query_rows x (bank_rows + 4 k devices)` numbers, for any size of the bank.

    Args:
        bank: `[N, D]` float32; the rows need not have unit length.
        queries: `[Q, D]` float32.
        k: at most N.
        rows: `[N]` bool, the rows of the bank to be searched; None for all.
        bank_rows, query_rows: the block sizes.
    """
    bank = as_table(bank)
    used = bank.column(np.ones(len(bank), bool) if rows is None else rows)
    search = _search(k, bank_rows)
    cosines, indices = [], []
    for start in range(0, len(queries), query_rows):
        block = queries[start : start + query_rows]
        count = len(block)
        if start:  # pad the last block, so that all blocks share one trace
            block = np.pad(block, ((0, query_rows - count), (0, 0)))
        cosine, index = search((bank.part, used), block)
        cosines.append(cosine[:count])
        indices.append(index[:count])
    return Neighbours(np.concatenate(cosines), np.concatenate(indices))


@functools.cache  # each k is compiled only once
def _search(k: int, bank_rows: int) -> Callable:
    return parallel.pmap_reduce(functools.partial(_nearest, k=k, bank_rows=bank_rows))


def _nearest(
    part: tuple[Part, jax.Array],
    queries: jax.Array,
    axis_name: str | None,
    *,
    k: int,
    bank_rows: int,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and rows `[Q, k]` of the nearest in all devices' parts of the bank."""
    of_device = _nearest_of_part(*part, queries, k=k, bank_rows=bank_rows)
    # In the order of the table, so that equal ones stay in the order of their rows.
    cosine, index = collectives.gather(of_device, axis_name, axis=1)
    cosine, position = lax.top_k(cosine, k)
    return cosine, jnp.take_along_axis(index, position, axis=1)


def _nearest_of_part(
    part: Part, used: jax.Array, queries: jax.Array, *, k: int, bank_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and rows `[Q, k]` of a device's part of the bank; -inf if it has fewer than k."""
    queries = _unit(queries)

    def search_block(best: tuple[jax.Array, jax.Array], block: Any, place: jax.Array) -> Any:
        rows, used = block  # [c, D], [c]
        cosine = jnp.dot(queries, _unit(rows).T, precision=lax.Precision.HIGHEST)  # [Q, c]
        cosine = jnp.where(used & (place >= 0), cosine, -jnp.inf)
        cosine, position = lax.top_k(cosine, min(k, len(place)))
        joined = jnp.concatenate([best[0], cosine], axis=1)
        index = jnp.concatenate([best[1], part.first + place[position]], axis=1)
        cosine, position = lax.top_k(joined, k)
        return cosine, jnp.take_along_axis(index, position, axis=1)

    size = (len(queries), k)
    start = (jnp.full(size, -jnp.inf), jnp.full(size, -1, jnp.int32))
    return scan_blocks(search_block, start, (part.rows, used), bank_rows)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows of length 1; rows of zeros stay."""
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(length > 0, length, 1.0)


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
