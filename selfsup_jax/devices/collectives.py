"""Inside a mapped step: what the devices tell each other, and how a batch is cut up among them.

Everything here takes the mapped axis' name, or None under plain `jax.jit`, where the one device
holds the whole global batch and nothing is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How the rows that a device holds are cut into views and batch-norm groups.

    Attributes:
        num_views: views stacked along the batch axis, each normalised by its own statistics.
        groups: batch-norm groups (or parts of one) of each view on this device.
        axis_name: the mapped axis, or None on a single device without pmap.
        index_groups: the devices that share one group, where that is not all of them.
    """

    num_views: int = 1
    groups: int = 1
    axis_name: str | None = None
    index_groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def sharing(self) -> int:
        """How many devices share one batch-norm group."""
        if self.axis_name is None:
            return 1
        return len(self.index_groups[0]) if self.index_groups else lax.axis_size(self.axis_name)

    def mean(self, x: Any) -> Any:
        """The mean of a tree over the devices that share this device's batch-norm groups."""
        if self.axis_name is None or (self.index_groups and self.sharing == 1):
            return x
        return lax.pmean(x, self.axis_name, axis_index_groups=self.index_groups)


def num_devices(axis_name: str | None) -> int:
    """How many devices share the global batch."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def groups_of_microbatch(bn_groups: int, accumulate_steps: int) -> int:
    """Batch-norm groups of each microbatch, where the global batch has `bn_groups`."""
    return max(1, bn_groups // max(1, accumulate_steps))


def batch_layout(bn_groups: int, num_views: int, axis_name: str | None) -> BatchLayout:
    """The layout of `bn_groups` groups of each view's global batch over the mapped devices.

    With fewer devices than groups a device holds several whole groups; with more, a group spans
    neighbouring devices.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if bn_groups == 1:
        return BatchLayout(num_views, 1, axis_name)
    span = max(1, devices // bn_groups)
    index_groups = tuple(tuple(range(i, i + span)) for i in range(0, devices, span))
    return BatchLayout(num_views, max(1, bn_groups // devices), axis_name, index_groups)


def mean(tree: Any, axis_name: str | None) -> Any:
    """The mean over all devices; the tree itself where there is no mapped axis."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


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


# ------------------------------------------------------- rows that come from other devices


def gather(tree: Any, axis_name: str | None, axis: int = 0) -> Any:
    """`[b, ...]` of every device to the `[B, ...]` of the global batch, in its order.

    `axis` is the batch's, where other axes come before it. The gradient of a loss that is averaged
    over devices flows back to the rows' own devices.
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, axis=axis, tiled=True), tree)


def first_row(rows: int, axis_name: str | None) -> jax.Array | int:
    """Where this device's `rows` rows begin among those of `gather`."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * rows


def deal(x: jax.Array, order: jax.Array, axis_name: str | None) -> jax.Array:
    """Deals a batch out to groups: each cell of G rows gives one row to each of the G groups.

    Row `order[i, g]` of this device's cell i goes to group g. Devices keep as many rows as they
    had, and the rows of a group lie together, as `batch_layout` expects: with fewer devices than
    groups a device holds several groups, with more a group spans neighbouring devices. Each
    device sends and receives no more than the rows that it holds, however many devices there are.

    Args:
        x: `[b, ...]`, this device's part of the global batch; b a multiple of G.
        order: `[b / G, G]` int32, a permutation of 0 ... G - 1 in each row.
        axis_name: the mapped axis, or None.

    Returns:
        `[b, ...]`, rows of this device's groups. `collect` undoes it.
    """
    cells = x.reshape(*order.shape, *x.shape[1:])
    cells = jax.vmap(lambda cell, places: cell[places])(cells, order)  # [b / G, G, ...]
    hands = jnp.swapaxes(cells, 0, 1)  # [G, b / G, ...]: what each group gets from here
    return _exchange(hands, axis_name, split=0, join=1).reshape(x.shape)


def collect(x: jax.Array, order: jax.Array, axis_name: str | None) -> jax.Array:
    """Puts the rows that `deal` gave out back in their places: `[b, ...]` to `[b, ...]`."""
    groups = order.shape[1]
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    here = max(1, groups // devices)  # groups (or one part of a group) on this device
    hands = _exchange(x.reshape(here, -1, *x.shape[1:]), axis_name, split=1, join=0, parts=groups)
    back = jnp.argsort(order, axis=1)
    rows = jax.vmap(lambda cell, places: cell[places])(jnp.swapaxes(hands, 0, 1), back)
    return rows.reshape(x.shape)


def _exchange(
    x: jax.Array, axis_name: str | None, *, split: int, join: int, parts: int | None = None
) -> jax.Array:
    """All-to-all among devices, one of each group where there are more devices than groups."""
    if axis_name is None:
        return x
    devices = lax.axis_size(axis_name)
    groups = parts or x.shape[split]
    span = max(1, devices // groups)  # devices that share a group
    # With a span, part m of every group talks to the parts m of the others.
    index_groups = [[g * span + m for g in range(groups)] for m in range(span)]
    return lax.all_to_all(
        x, axis_name, split, join, axis_index_groups=index_groups if span > 1 else None, tiled=True
    )
