"""Weighted nearest neighbours: Wu et al. 2018 (arXiv 1805.01978), section 3.4."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.preprocessing import normalize

from selfsup_jax.evaluation.features import Features


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _votes(
    queries: jax.Array,
    bank: jax.Array,
    labels: jax.Array,
    temperature: float,
    *,
    k: int,
    num_classes: int,
) -> jax.Array:
    """Class votes `[Q, classes]` of queries `[Q, D]` against a bank `[N, D]`, unit vectors both."""
    similarity, neighbours = jax.lax.top_k(queries @ bank.T, k)  # [Q, k]
    # exp(s / T) as in the paper, divided by the largest so that it can't overflow.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    votes = jax.nn.one_hot(labels[neighbours], num_classes) * weights[..., None]
    return votes.sum(axis=1)


def knn_accuracy(
    train: Features, test: Features, *, k: int = 200, temperature: float = 0.1, chunk: int = 256
) -> float:
    """Top-1 of the k nearest training features by cosine, votes weighted by exp(cosine / T).

    Args:
        train: the bank; its labels vote.
        test: the queries, taken `chunk` at a time: memory is chunk x N similarities.
        k: neighbours, at most as many as the bank holds.
        temperature: T.
        chunk: queries at once.

    Returns:
        A fraction in [0, 1].
    """
    bank = jnp.asarray(normalize(train.x))
    labels = jnp.asarray(train.labels)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    queries = normalize(test.x)
    hits = 0
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        votes = _votes(
            padded, bank, labels, temperature, k=min(k, len(bank)), num_classes=num_classes
        )
        predicted = np.asarray(votes).argmax(axis=1)[: len(part)]
        hits += int(np.sum(predicted == test.labels[start : start + chunk]))
    return hits / len(queries)
