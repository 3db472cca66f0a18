"""A table whose rows are spread over all devices of all hosts, such as the features of a data set.

No host holds the whole table, and none holds its part twice: a device's rows are collected in one
array, which is placed as soon as it is full. On the CPU the device then uses that array itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from selfsup_jax.devices import collectives, hosts, parallel

_AT_ONCE = 1024  # rows that `Table.__getitem__` copies from the devices in one call
_ALIGNED = 64  # bytes; JAX uses such an array on the CPU without a copy


class Part(NamedTuple):
    """A device's part of a table; outside of a mapped function, with a leading device axis.

    Attributes:
        rows: `[n, D]` float32; zeros after the first `count`.
        first: `[]` int32, the first row's index in the table.
        count: `[]` int32.
    """

    rows: Any
    first: Any
    count: Any


class Table:
    """`[N, D]` float32, in contiguous parts: in the order of the hosts, then of their devices.

    Attributes:
        part: the parts of all devices.
        shape: `(N, D)`.
    """

    def __init__(self, shards: list[jax.Array], counts: list[int]):
        """All hosts must call it.

        Args:
            shards: `[1, n, D]` for each of this host's devices, on that device.
            counts: how many of a device's n rows are there.
        """
        here = np.asarray([[sum(counts)]])
        before = hosts.gather_hosts(here)[: jax.process_index()].sum()
        first = (before + np.cumsum([0, *counts[:-1]])).astype(np.int32)
        rows = parallel.joined(shards)
        self.part = Part(rows, first, np.asarray(counts, np.int32))
        self.shape = (int(hosts.gather_hosts(here).sum()), rows.shape[-1])
        self._own = slice(int(before), int(before) + sum(counts))
        self._counts = counts

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Copies rows, given as in NumPy, to every host; all hosts must ask for the same ones."""
        wanted = np.arange(len(self), dtype=np.int32)[rows]
        at_once = min(_AT_ONCE, 1 << max(0, len(wanted) - 1).bit_length())  # few shapes to compile
        gathered = np.empty((len(wanted), self.shape[1]), np.float32)
        for start in range(0, len(wanted), at_once):
            block = wanted[start : start + at_once]
            padded = np.pad(block, (0, at_once - len(block)), constant_values=-1)
            rows_there = parallel.pmap_reduce(_take_rows)(self.part, padded)
            gathered[start : start + at_once] = rows_there[: len(block)]
        return gathered

    def column(self, values: np.ndarray) -> np.ndarray:
        """One value for each row, `[N, ...]`, as it lies beside the rows of this host's devices."""
        size = self.part.rows.shape[1]
        ends = np.cumsum(self._counts)[:-1]
        parts = np.split(np.asarray(values)[self._own], ends)
        widths = [(0, 0)] * (np.ndim(values) - 1)
        return np.stack([np.pad(part, [(0, size - len(part)), *widths]) for part in parts])


def _take_rows(part: Part, wanted: jax.Array, axis_name: str | None) -> jax.Array:
    place = wanted - part.first
    here = (place >= 0) & (place < part.count) & (wanted >= 0)
    rows = jnp.where(here[:, None], part.rows[jnp.clip(place, 0, len(part.rows) - 1)], 0.0)
    return collectives.total(rows, axis_name)


def spread(parts: Iterable[np.ndarray], most: int) -> Table:
    """Spreads rows over the devices while they arrive; all hosts must call it.

    Args:
        parts: this host's rows, `[n, D]` each, at least one in all; the table has those of host 0
            first.
        most: at least the number of rows of all hosts, which have equal parts of them.
    """
    devices = jax.local_devices()
    # TFDS divides each part of a split evenly: a host may have a row more for each of them.
    of_host = -(-most // jax.process_count()) + 16 * (jax.process_count() > 1)
    size = max(1, -(-of_host // len(devices)))
    shards: list[jax.Array] = []
    counts: list[int] = []
    shard, count = np.empty((1, 0, 0), np.float32), 0

    def place() -> None:
        shard[0, count:] = 0.0  # not whatever was in the memory before
        shards.append(jax.device_put(shard, devices[len(shards)]))
        counts.append(count)

    width = 0
    for part in parts:
        width, done = part.shape[1], 0
        while done < len(part):
            if count == shard.shape[1]:
                if count:
                    place()
                shard, count = _aligned((1, size, width)), 0
            taken = part[done : done + size - count]
            shard[0, count : count + len(taken)] = taken
            done, count = done + len(taken), count + len(taken)
    width = int(hosts.gather_hosts(np.asarray([width])).max())  # also for a host without a row
    while len(shards) < len(devices):
        if not shard.size:  # nothing for this device
            shard, count = _aligned((1, size, width)), 0
        place()
        shard, count = np.empty((1, 0, 0), np.float32), 0
    return Table(shards, counts)


def as_table(rows: np.ndarray | Table) -> Table:
    """Rows that every host has, as a table: each host places its own part."""
    if isinstance(rows, Table):
        return rows
    own = np.array_split(np.arange(len(rows)), jax.process_count())[jax.process_index()]
    part = rows[own[0] : own[-1] + 1] if len(own) else rows[:0]
    return spread([np.asarray(part, np.float32)], len(rows))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised float32 array that JAX can use without a copy."""
    count = int(np.prod(shape))
    raw = np.empty(4 * count + _ALIGNED, np.uint8)
    offset = -raw.ctypes.data % _ALIGNED
    return raw[offset : offset + 4 * count].view(np.float32).reshape(shape)


def scan_blocks(
    step: Callable[[Any, Any, jax.Array], Any], carry: Any, columns: Any, block: int
) -> Any:
    """Runs `step(carry, block, place) -> carry` over a device's rows, block by block.

    All blocks have the same size, so the last one may begin with rows of the one before. `place`
    `[block]` int32 is each row's place in the device's part, or -1 if it was there before.

    Args:
        step: see above.
        carry: its first value.
        columns: a tree of arrays `[n, ...]`.
        block: the number of rows, at most.
    """
    rows = len(jax.tree.leaves(columns)[0])
    block = min(block, rows)

    def body(i: jax.Array, carry: Any) -> Any:
        start = jnp.minimum(i * block, rows - block)
        here = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), columns)
        place = start + jnp.arange(block, dtype=jnp.int32)
        return step(carry, here, jnp.where(place >= i * block, place, -1))

    return lax.fori_loop(0, -(-rows // block), body, carry)
