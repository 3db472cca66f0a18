"""Rows that come from other devices: dealt out to groups and collected again, and gathered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, messages

from selfsup_jax.devices import collectives

ROWS = 64  # of the global batch


def over(devices, fn, *arrays):
    """`fn(*rows, axis_name=...)` of global arrays spread over devices: `[devices, ...]`.

    Without devices it is plain `jax.jit`, and the axis has a length of 1.
    """
    if not devices:
        out = jax.jit(functools.partial(fn, axis_name=None))(*arrays)
        return jax.tree.map(lambda x: np.asarray(x)[None], out)
    mapped = jax.pmap(
        functools.partial(fn, axis_name="d"), axis_name="d", devices=jax.devices()[:devices]
    )
    spread = [x.reshape(devices, -1, *x.shape[1:]) for x in arrays]
    return jax.tree.map(np.asarray, mapped(*spread))


# ------------------------------------------------------------------------ deal and collect


def cells_and_order(groups):
    """`[ROWS, 2]` rows of one number and a hundred times it, and who goes where in each cell."""
    numbers = np.random.default_rng(0).permutation(ROWS).astype(np.float32)
    rng = np.random.default_rng(groups)
    order = np.stack([rng.permutation(groups) for _ in range(ROWS // groups)])
    return np.stack([numbers, 100 * numbers], axis=1), order.astype(np.int32)


@functools.cache
def dealt(devices, groups):
    """What every device holds: (dealt rows, collected rows, each dealt row's group mean)."""

    def fn(x, order, axis_name):
        rows = collectives.batch_shuffle(x, order, axis_name)
        # The mean over a group as batch norm takes it: of the parts here, then among devices.
        layout = collectives.batch_layout(groups, 1, axis_name)
        means = layout.mean(rows[:, 0].reshape(layout.groups, -1).mean(1))
        means = jnp.repeat(means, len(rows) // layout.groups)
        return rows, collectives.batch_unshuffle(rows, order, axis_name), means

    return over(devices, fn, *cells_and_order(groups))


def groups_by_hand(groups):
    """The numbers that each group gets, cell by cell: `[groups, ROWS / groups]`."""
    x, order = cells_and_order(groups)
    cells = x[:, 0].reshape(-1, groups)
    return np.take_along_axis(cells, order, axis=1).T


every_layout = pytest.mark.parametrize("devices", [0, 1, 2, 4, 8])
every_cut = pytest.mark.parametrize("groups", [2, 4, 8])


@pytest.mark.slow
@every_layout
@every_cut
def test_what_is_dealt_out_can_be_collected(devices, groups):
    """Whole rows, each back in its place on its device; while dealt out they are elsewhere."""
    x = cells_and_order(groups)[0]
    rows, back, _ = dealt(devices, groups)
    np.testing.assert_array_equal(back.reshape(x.shape), x)
    assert rows.shape == back.shape  # devices keep as many rows as they had
    np.testing.assert_array_equal(rows[..., 1], 100 * rows[..., 0])
    assert (rows != back).mean() > 0.5


@pytest.mark.slow
@every_layout
@every_cut
def test_a_group_gets_the_same_rows_on_any_devices(devices, groups):
    """The groups lie in the order of the devices, each on one or on neighbouring ones."""
    rows = dealt(devices, groups)[0][..., 0].reshape(groups, -1)
    np.testing.assert_array_equal(np.sort(rows), np.sort(groups_by_hand(groups)))


@every_layout
@every_cut
def test_a_group_gets_one_row_of_each_cell(devices, groups):
    numbers = cells_and_order(groups)[0][:, 0]
    cell_of = {number: i // groups for i, number in enumerate(numbers)}
    for rows in dealt(devices, groups)[0][..., 0].reshape(groups, -1):
        assert sorted(cell_of[row] for row in rows) == list(range(ROWS // groups))


@every_layout
@every_cut
def test_dealt_groups_are_batch_norms(devices, groups):
    """The rows that batch norm takes the mean of are those of the group, no more and no fewer."""
    rows, _, means = dealt(devices, groups)
    expected = {number: group.mean() for group in groups_by_hand(groups) for number in group}
    expected = [expected[row] for row in rows[..., 0].reshape(-1)]
    np.testing.assert_allclose(means.reshape(-1), expected, rtol=1e-5)
    assert np.ptp(means) > 1  # the groups are not alike


@pytest.mark.parametrize("devices", [2, 4, 8])
@every_cut
def test_a_device_sends_only_what_it_holds(devices, groups):
    """Dealing and collecting are one exchange each, of the local rows, with no one gathering."""
    local = 16

    def fn(x, order):
        return collectives.batch_unshuffle(collectives.batch_shuffle(x, order, "d"), order, "d")

    mapped = jax.pmap(fn, axis_name="d", devices=jax.devices()[:devices])
    x = np.zeros((devices, local, 5), np.float32)
    order = np.zeros((devices, local // groups, groups), np.int32)
    assert messages(mapped.lower(x, order)) == {"all_to_all": [local * 5, local * 5]}


# --------------------------------------------------------------------------------- gather


@every_layout
def test_gathered_rows_are_the_global_batch(devices):
    """On every device, in its order, along whichever axis is the batch's."""
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)

    def fn(x, axis_name):
        tree = collectives.gather({"rows": x, "double": 2 * x}, axis_name)
        views = collectives.gather(jnp.stack([x, -x]), axis_name, axis=1)
        first = collectives.batch_offset(len(x), axis_name)
        own = jax.lax.dynamic_slice_in_dim(tree["rows"], first, len(x))
        return tree, views, own, jnp.asarray(first)

    tree, views, own, first = over(devices, fn, x)
    count = max(1, devices)
    np.testing.assert_array_equal(tree["rows"], np.stack([x] * count))
    np.testing.assert_array_equal(tree["double"], np.stack([2 * x] * count))
    np.testing.assert_array_equal(views, np.stack([np.stack([x, -x])] * count))
    np.testing.assert_array_equal(own.reshape(x.shape), x)  # the device's rows among all
    np.testing.assert_array_equal(first, np.arange(count) * (ROWS // count))


@every_layout
def test_gradient_of_gathered_rows(devices):
    """Of a loss in which each row is compared with all rows: finite differences on one device."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(16, 4)), 0.3 * rng.normal(size=(4, 3))

    def by_hand(w):
        logits = (x @ w) @ (x @ w).T
        return np.mean(np.log(np.exp(logits).sum(1)) - np.diag(np.roll(logits, -1, axis=1)))

    def fn(x, axis_name):
        def loss(w):
            rows = x @ w
            everyone = collectives.gather(rows, axis_name)
            logits = rows @ everyone.T
            following = (collectives.batch_offset(len(x), axis_name) + jnp.arange(len(x)) + 1) % 16
            own = jnp.take_along_axis(logits, following[:, None], axis=1)[:, 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)

        return collectives.mean(jax.value_and_grad(loss)(jnp.asarray(w, jnp.float32)), axis_name)

    gradient = np.zeros_like(w)
    for i in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[i] = 1e-6
        gradient[i] = (by_hand(w + step) - by_hand(w - step)) / 2e-6
    values, gradients = over(devices, fn, x.astype(np.float32))
    for value, got in zip(values, gradients, strict=True):  # on every device
        np.testing.assert_allclose(value, by_hand(w), rtol=1e-5)
        assert_close(got, gradient, relative=1e-4)


def test_means_of_small_arrays_are_sent_as_one(monkeypatch):
    """Between processes on CPUs; each mean stays the same bit for bit."""
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 3), "b": (8,), "c": (8, 2, 5), "large": (8, 2**16)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tree["count"] = np.arange(8)
    sent, found = {False: [], True: []}, {}
    originals = {name: getattr(jax.lax, name) for name in ("pmean", "psum")}
    for joined, sizes in sent.items():
        monkeypatch.setattr(collectives, "_sent_by_gloo", lambda joined=joined: joined)

        def counted(x, *args, original, sizes=sizes, **options):
            sizes += [[leaf.size for leaf in jax.tree.leaves(x)]]
            return original(x, *args, **options)

        for name, original in originals.items():
            monkeypatch.setattr(jax.lax, name, functools.partial(counted, original=original))
        found[joined] = jax.vmap(lambda x: collectives.mean(x, "d"), axis_name="d")(tree)
    assert sent == {False: [[3, 1, 10, 1, 2**16]], True: [[3 + 1 + 10], [1], [2**16]]}
    jax.tree.map(np.testing.assert_array_equal, found[True], found[False])
