"""Collectives used inside a training step, and how a batch is divided among the devices.

The functions take the name of the mapped axis, or None under plain `jax.jit`, where one device has
the whole global batch and nothing is sent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class RowNoise:
    """Random draws of the layers for each row: they don't depend on the device that it is on.

    Attributes:
        rng: the key of a step.
        index: `[b]` int32, the positions of the device's images in the global batch.
        first_view: the number of the first of the stacked views. Calls of one step that differ in
            it have different draws.
    """

    rng: jax.Array
    index: jax.Array
    first_view: int = 0

    def uniform(self, rows: int, count: int) -> jax.Array:
        """`[rows, count]` float32 in [0, 1), for the rows of `rows / b` stacked views."""
        fold_in = jax.random.fold_in
        rng = fold_in(self.rng, 0x64726F70)  # the views' augmentation has 1, 2, ...
        views = self.first_view + jnp.arange(rows // len(self.index))
        of_views = jax.vmap(fold_in, (None, 0))(rng, views)
        keys = jax.vmap(lambda key: jax.vmap(fold_in, (None, 0))(key, self.index))(of_views)
        draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (count,))))
        return draw(keys).reshape(rows, count)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How the rows of a device are divided into views and batch-norm groups.

    Attributes:
        num_views: views stacked along the batch axis, each normalised by its own statistics.
        groups: batch-norm groups (or parts of one) of each view on this device.
        axis_name: the mapped axis, or None on a single device without pmap.
        index_groups: the devices that share each group; None if all devices share one.
        noise: the rows' draws, for drop path; None: nothing is drawn.
    """

    num_views: int = 1
    groups: int = 1
    axis_name: str | None = None
    index_groups: tuple[tuple[int, ...], ...] | None = None
    noise: RowNoise | None = None

    @property
    def sharing(self) -> int:
        """The number of devices that share one batch-norm group."""
        if self.axis_name is None:
            return 1
        return len(self.index_groups[0]) if self.index_groups else lax.axis_size(self.axis_name)

    def mean(self, x: Any) -> Any:
        """The mean of a tree over the devices that share this device's batch-norm groups."""
        if self.axis_name is None or (self.index_groups and self.sharing == 1):
            return x
        return _pmean(x, self.axis_name, self.index_groups)


def num_devices(axis_name: str | None) -> int:
    """The number of devices that share the global batch."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def groups_of_microbatch(bn_groups: int, accumulate_steps: int) -> int:
    """Batch-norm groups of each microbatch, if the global batch has `bn_groups`."""
    return max(1, bn_groups // max(1, accumulate_steps))


def batch_layout(
    bn_groups: int, num_views: int, axis_name: str | None, noise: RowNoise | None = None
) -> BatchLayout:
    """The layout of `bn_groups` groups of each view's global batch over the mapped devices.

    With fewer devices than groups, a device holds several whole groups; with more, a group spans
    neighbouring devices. `noise`: for the branches that learn.
    """
    devices = num_devices(axis_name)
    if bn_groups == 1:
        return BatchLayout(num_views, 1, axis_name, noise=noise)
    span = max(1, devices // bn_groups)
    index_groups = tuple(tuple(range(i, i + span)) for i in range(0, devices, span))
    return BatchLayout(num_views, max(1, bn_groups // devices), axis_name, index_groups, noise)


def mean(tree: Any, axis_name: str | None) -> Any:
    """The mean over all devices; the tree itself if there is no mapped axis."""
    return tree if axis_name is None else _pmean(tree, axis_name)


def _pmean(tree: Any, axis_name: str, index_groups: Any = None) -> Any:
    """`lax.pmean`; between processes on CPUs, small arrays are sent as one.

    The compilers for accelerators join them by themselves. Gloo sends each in a call of its own,
    which took longer than the arithmetic: a step of BYOL has 285 of them.
    """
    psum = functools.partial(lax.psum, axis_name=axis_name, axis_index_groups=index_groups)
    leaves, structure = jax.tree.flatten(tree)
    small = [i for i, x in enumerate(leaves) if x.size < 2**16 and x.dtype == jnp.float32]
    if not _sent_by_gloo() or len(small) < 2:
        return lax.pmean(tree, axis_name, axis_index_groups=index_groups)
    # What is computed before and after is compiled as it would be around each array's own sum:
    # fused with the joining and the splitting, it would round otherwise than in one process.
    leaves = lax.optimization_barrier(leaves)
    ends = list(itertools.accumulate(leaves[i].size for i in small))
    packed = psum(jnp.concatenate([leaves[i].ravel() for i in small]))
    sums = [None if i in small else psum(x) for i, x in enumerate(leaves)]
    for i, part in zip(small, jnp.split(packed, ends[:-1]), strict=True):
        sums[i] = part.reshape(leaves[i].shape)
    sums = lax.optimization_barrier(sums)
    devices = len(index_groups[0]) if index_groups else lax.axis_size(axis_name)
    return jax.tree.unflatten(structure, [x / devices for x in sums])


def _sent_by_gloo() -> bool:
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def total(tree: Any, axis_name: str | None) -> Any:
    """The sum over all devices; the tree itself if there is no mapped axis."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def accumulate(
    step: Callable[[Any, Any], tuple[Any, Any, Any]], carry: Any, batch: Any, microbatches: int
) -> tuple[Any, Any, Any]:
    """Runs `step(carry, microbatch) -> (carry, means, rows)` over the device's microbatches.

    Returns:
        The last carry, the mean of the means, and the rows of all microbatches: an array
        `[V, b, ...]` of a microbatch of b examples becomes `[V, microbatches * b, ...]`.
    """
    if microbatches == 1:
        return step(carry, batch)
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, carry, first)[1]
    )

    def body(state: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], Any]:
        carry, total = state
        carry, means, rows = step(carry, part)
        return (carry, jax.tree.map(jnp.add, total, means)), rows

    (carry, total), rows = lax.scan(body, (carry, zeros), parts)  # rows: [microbatches, V, b, ...]
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), rows)
    return carry, jax.tree.map(lambda x: x / microbatches, total), rows


# --------------------------------------------------------------- rows from other devices


def gather(tree: Any, axis_name: str | None, axis: int = 0) -> Any:
    """Gathers `[b, ...]` of every device to `[B, ...]`, in the order of the global batch.

    `axis` is the batch axis. The gradient of a loss that is averaged over devices flows back to
    the devices that the rows come from.
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, axis=axis, tiled=True), tree)


def batch_offset(rows: int, axis_name: str | None) -> jax.Array | int:
    """The index of the first of this device's `rows` rows in the result of `gather`."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * rows


def batch_shuffle(x: jax.Array, order: jax.Array, axis_name: str | None) -> jax.Array:
    """Spreads each block of G rows over the G batch-norm groups: MoCo's batch shuffling.

    Row `order[i, g]` of this device's block i goes to group g. The number of rows per device stays
    the same, and the rows of a group are contiguous, as `batch_layout` expects: with fewer devices
    than groups, a device holds several groups; with more, a group spans neighbouring devices. A
    device never sends or receives more rows than it holds, for any number of devices.

    Args:
        x: `[b, ...]`, this device's part of the global batch; b a multiple of G.
        order: `[b / G, G]` int32, a permutation of 0 ... G - 1 in each row.
        axis_name: the mapped axis, or None.

    Returns:
        `[b, ...]`, rows of this device's groups. `batch_unshuffle` undoes it.
    """
    blocks = x.reshape(*order.shape, *x.shape[1:])
    blocks = jax.vmap(lambda block, index: block[index])(blocks, order)  # [b / G, G, ...]
    chunks = jnp.swapaxes(blocks, 0, 1)  # [G, b / G, ...]: this device's rows for each group
    return _exchange(chunks, axis_name, split=0, join=1).reshape(x.shape)


def batch_unshuffle(x: jax.Array, order: jax.Array, axis_name: str | None) -> jax.Array:
    """Puts the rows of `batch_shuffle` back in order: `[b, ...]` to `[b, ...]`."""
    groups = order.shape[1]
    devices = num_devices(axis_name)
    local = max(1, groups // devices)  # groups (or one part of a group) on this device
    chunks = _exchange(x.reshape(local, -1, *x.shape[1:]), axis_name, split=1, join=0, parts=groups)
    inverse = jnp.argsort(order, axis=1)
    rows = jax.vmap(lambda block, index: block[index])(jnp.swapaxes(chunks, 0, 1), inverse)
    return rows.reshape(x.shape)


def _exchange(
    x: jax.Array, axis_name: str | None, *, split: int, join: int, parts: int | None = None
) -> jax.Array:
    """All-to-all among all devices or, if a group spans several devices, one device per group."""
    if axis_name is None:
        return x
    devices = lax.axis_size(axis_name)
    groups = parts or x.shape[split]
    span = max(1, devices // groups)  # devices that share a group
    # If groups span several devices, the m-th devices of all groups exchange with each other.
    index_groups = [[g * span + m for g in range(groups)] for m in range(span)]
    return lax.all_to_all(
        x, axis_name, split, join, axis_index_groups=index_groups if span > 1 else None, tiled=True
    )
