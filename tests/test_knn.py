"""Nearest neighbours against NumPy's brute force, on eight devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from selfsup_jax.devices import parallel
from selfsup_jax.evaluation import knn


def rows_of(count, seed, dimensions=5):
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def by_hand(bank, queries, k):
    """(cosines, rows) in float64; a stable sort gives the first of equal ones."""
    bank, queries = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        for x in (bank.astype(np.float64), queries.astype(np.float64))
    )
    cosine = queries @ bank.T
    rows = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, rows, axis=1), rows


def assert_nearest(found, bank, queries, k):
    cosine, rows = by_hand(bank, queries, k)
    assert found.cosine.shape == found.rows.shape == (len(queries), k)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- the table, cut up


@pytest.mark.parametrize(("count", "block"), [(1, 4), (8, 3), (50, 3), (50, 100), (64, 8)])
def test_shard_rows_holds_each_row_once(count, block):
    """In the table's order over the devices; what fills up has the number -1."""
    devices = jax.local_device_count()
    table = rows_of(count, 0)
    part = jax.device_get(parallel.shard_rows(table, block))
    assert part.indices.shape[0] == devices and part.indices.shape[2] <= block
    assert part.rows.shape == (*part.indices.shape, table.shape[1])
    numbers = part.indices.ravel()
    there = numbers >= 0
    np.testing.assert_array_equal(numbers[there], np.arange(count))
    np.testing.assert_array_equal(part.rows.reshape(-1, table.shape[1])[there], table)
    # No device holds a whole block that it doesn't need.
    assert part.indices[0].size - part.indices.shape[2] < -(-count // devices)


# ------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize(
    ("bank_rows", "query_rows"), [(1, 11), (3, 4), (5, 1), (8192, 1024)], ids=str
)
def test_nearest_is_brute_force(bank_rows, query_rows):
    """Blocks that divide neither the 53 rows, nor a device's 7 of them, nor the 11 queries."""
    bank, queries = rows_of(53, 0), rows_of(11, 1)
    found = knn.nearest(bank, queries, 6, bank_rows=bank_rows, query_rows=query_rows)
    assert_nearest(found, bank, queries, 6)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (3, 2), (5, 5), (17, 17)])
def test_nearest_of_a_bank_with_fewer_rows_than_k_on_each_device(count, k):
    """Fewer rows than devices, and all of the bank: nothing that only fills up comes back."""
    bank, queries = rows_of(count, 0), rows_of(4, 1)
    found = knn.nearest(bank, queries, k, bank_rows=2)
    assert found.rows.min() >= 0 and np.isfinite(found.cosine).all()
    assert_nearest(found, bank, queries, k)


@pytest.mark.parametrize("bank_rows", [1, 2, 8192])
def test_of_equally_near_rows_the_first_of_the_bank_comes_first(bank_rows):
    """Copies that lie on one device, in one block of it, and on different devices.

    The rows are axes, whose products are exact however they are summed.
    """
    axes = np.random.default_rng(0).integers(0, 3, 41)
    bank, queries = np.eye(4, dtype=np.float32)[axes], np.eye(4, dtype=np.float32)
    found = knn.nearest(bank, queries, 20, bank_rows=bank_rows)
    for axis in range(3):
        copies = np.flatnonzero(axes == axis)[:20]
        np.testing.assert_array_equal(found.rows[axis, : len(copies)], copies)
        np.testing.assert_array_equal(found.cosine[axis, : len(copies)], 1.0)
    np.testing.assert_array_equal(found.rows[3], np.arange(20))  # all are as far: none is nearer
    assert_nearest(found, bank, queries, 20)


def test_lengths_do_not_matter():
    bank, queries = rows_of(30, 0), rows_of(7, 1)
    lengths = np.random.default_rng(2).uniform(0.01, 100, (30, 1)).astype(np.float32)
    scaled = knn.nearest(bank * lengths, 1000 * queries, 4)
    assert_nearest(scaled, bank, queries, 4)


def test_memory_does_not_grow_with_the_bank():
    """What a device needs beside its part of the bank is that of one look, for 16 times as much."""
    sizes = []
    queries = jax.ShapeDtypeStruct((24, 16), np.float32)
    for blocks in (8, 128):
        shape = (jax.local_device_count(), blocks, 32)
        part = parallel.RowsPart(
            jax.ShapeDtypeStruct((*shape, 16), np.float32), jax.ShapeDtypeStruct(shape, np.int32)
        )
        compiled = knn._search(5).lower(part, queries).compile()
        sizes.append(compiled.memory_analysis())
    small, large = sizes
    assert large.argument_size_in_bytes > 10 * small.argument_size_in_bytes
    assert 0 < large.temp_size_in_bytes <= 1.05 * small.temp_size_in_bytes
    assert small.temp_size_in_bytes < 4 * 8 * 24 * (32 + 4 * 5) * 4  # some looks, not a bank


# --------------------------------------------------------------------------------- vote


def votes_by_hand(cosine, rows, labels, num_classes, k, temperature):
    votes = np.zeros((len(rows), num_classes))
    for query in range(len(rows)):
        for place in range(k):
            weight = np.exp(float(cosine[query, place]) / temperature)
            votes[query, labels[rows[query, place]]] += weight
    return votes


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_one_search_serves_every_smaller_k(temperature):
    """Votes are in proportion to those by hand, whatever k is; a class without votes has none."""
    bank, queries = rows_of(40, 0), rows_of(9, 1)
    labels = np.random.default_rng(2).choice([0, 1, 3], 40)  # of five classes
    found = knn.nearest(bank, queries, 40)
    for k in (1, 2, 7, 40):
        votes = knn.vote(found, labels, 5, k=k, temperature=temperature)
        expected = votes_by_hand(*by_hand(bank, queries, k), labels, 5, k, temperature)
        assert votes.shape == (9, 5) and not votes[:, [2, 4]].any()
        shares = [v / v.sum(axis=1, keepdims=True) for v in (votes, expected)]
        np.testing.assert_allclose(*shares, rtol=1e-4, atol=1e-7)
        # The same neighbours, had they been all that was looked for.
        alone = knn.vote(knn.nearest(bank, queries, k), labels, 5, k=k, temperature=temperature)
        np.testing.assert_allclose(votes, alone, rtol=1e-5)


def test_votes_of_a_tiny_temperature_are_finite():
    """The nearest alone decides, though exp(1 / T) is no number of any float."""
    found = knn.Neighbours(
        np.asarray([[0.9, 0.8, 0.8], [-0.5, -0.6, -0.7]], np.float32),
        np.asarray([[2, 0, 1], [1, 0, 2]], np.int32),
    )
    votes = knn.vote(found, np.asarray([1, 1, 0]), 2, k=3, temperature=1e-4)
    assert np.isfinite(votes).all()
    np.testing.assert_array_equal(votes.argmax(axis=1), [0, 1])
