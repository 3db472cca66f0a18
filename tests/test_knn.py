"""Nearest neighbours against NumPy's brute force, on eight devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from selfsup_jax.devices import table
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


@pytest.mark.parametrize("count", [1, 8, 50, 64])
def test_a_table_holds_each_row_once(count):
    """In the order of the devices; zeros fill up."""
    given = rows_of(count, 0)
    spread = table.spread(np.array_split(given, 3), count)
    part = jax.device_get(spread.part)
    devices, size = jax.local_device_count(), -(-count // jax.local_device_count())
    assert part.rows.shape == (devices, size, given.shape[1])
    there = np.arange(size) < part.count[:, None]
    np.testing.assert_array_equal(part.rows[there], given)
    assert not part.rows[~there].any()
    np.testing.assert_array_equal(part.first[part.count > 0], np.arange(count)[::size])
    assert spread.shape == given.shape and len(spread) == count
    for rows in (slice(None), given[:, 0] > 0, [count - 1, 0, count // 2], slice(5, 2)):
        np.testing.assert_array_equal(spread[rows], given[rows])
    labels = np.arange(2 * count).reshape(count, 2)
    np.testing.assert_array_equal(spread.column(labels)[there], labels)


def test_a_table_is_in_memory_once(monkeypatch):
    """The devices of the CPU use the arrays in which the rows were collected."""
    made, aligned = [], table._aligned
    monkeypatch.setattr(table, "_aligned", lambda shape: made.append(aligned(shape)) or made[-1])
    spread = table.spread(np.array_split(rows_of(4096, 0), 7), 4096)
    on_devices = [s.data.unsafe_buffer_pointer() for s in spread.part.rows.addressable_shards]
    assert on_devices == [array.ctypes.data for array in made]
    assert sum(array.size for array in made) == 4096 * 5


@pytest.mark.parametrize("bank_rows", [4, 8192])
def test_neighbours_do_not_depend_on_the_number_of_devices(bank_rows):
    """Rows of several devices that are equally near stay in the order of the bank."""
    # Of length 1 or 2, so that products are exact however they are summed; many are copies.
    corners, axes = (
        np.random.default_rng(0).choice([-1.0, 1.0], (41, 4)),
        np.eye(4)[np.arange(41) % 4],
    )
    rows = np.where(np.arange(41)[:, None] % 3 == 0, corners, axes).astype(np.float32)
    queries, used = rows[[0, 1, 3, 5]], np.arange(41) % 5 != 2
    search = functools.partial(knn._nearest, k=20, bank_rows=bank_rows)
    found = {}
    for devices in (1, 2, 4):
        pieces = np.array_split(np.arange(41), devices)
        size = len(pieces[0])
        first, count = (np.asarray(x) for x in zip(*((p[0], len(p)) for p in pieces), strict=True))
        pad = lambda x, pieces=pieces, size=size: np.stack(  # noqa: E731
            [np.pad(x[p], [(0, size - len(p))] + [(0, 0)] * (x.ndim - 1)) for p in pieces]
        )
        part = table.Part(pad(rows), first, count)
        mapped = jax.vmap(functools.partial(search, axis_name="d"), (0, None), axis_name="d")
        found[devices] = jax.device_get(mapped((part, pad(used)), queries))
        for of_device in found[devices]:
            np.testing.assert_array_equal(of_device, np.broadcast_to(of_device[0], of_device.shape))
    for devices in (2, 4):
        for alone, together in zip(found[1], found[devices], strict=True):
            np.testing.assert_array_equal(together[0], alone[0])
    assert used[found[1][1]].all()
    np.testing.assert_array_equal(
        found[1][1][0], np.flatnonzero(used)[by_hand(rows[used], queries, 20)[1]]
    )


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
        shape = (jax.local_device_count(), 32 * blocks)
        of_device = jax.ShapeDtypeStruct(shape[:1], np.int32)
        rows = jax.ShapeDtypeStruct((*shape, 16), np.float32)
        part = table.Part(rows, of_device, of_device), jax.ShapeDtypeStruct(shape, bool)
        compiled = knn._search(5, 32).lower(part, queries).compile()
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
