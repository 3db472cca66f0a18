"""Devices and hosts: the only file that knows pmap, the axis name and replication.

What the devices tell each other inside a step is in `collectives.py`.

A *global batch* of B examples is spread over all devices of all hosts. Everything random about an
example is keyed by its index in the global batch, and batch-norm groups are cut out of the global
batch, so that the number of devices is a matter of speed and memory and not of mathematics.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from selfsup_jax.devices import hosts
from selfsup_jax.devices.collectives import groups_of_microbatch
from selfsup_jax.errors import UserError, bad_field

AXIS_NAME = "devices"
ENGINES = ("pmap", "shard_map")
_engine = "pmap"  # see `use_engine`


# ------------------------------------------------------------------- the global batch


def check_batch(batch_size: int, accumulate_steps: int, bn_groups: int) -> None:
    """Checks that the global batch divides over devices, microbatches and batch-norm groups.

    Raises:
        UserError: naming the field, and what would be valid.
    """
    devices = jax.device_count()
    unit = devices * accumulate_steps
    if batch_size % unit:
        raise bad_field(
            "batch_size",
            batch_size,
            f"must be a multiple of {unit} (devices {devices} x accumulate_steps "
            f"{accumulate_steps}); nearest: {max(1, round(batch_size / unit)) * unit}",
        )
    if bn_groups % accumulate_steps and bn_groups != 1:
        raise bad_field(
            "bn_groups",
            bn_groups,
            f"must be 1 or a multiple of accumulate_steps={accumulate_steps}",
        )
    groups = groups_of_microbatch(bn_groups, accumulate_steps)
    if (batch_size // accumulate_steps) % groups:
        raise bad_field("bn_groups", bn_groups, f"must divide batch_size={batch_size}")
    if max(groups, devices) % min(groups, devices):
        raise bad_field(
            "bn_groups", bn_groups, f"must divide, or be a multiple of, the {devices} devices"
        )


def host_positions(batch_size: int, accumulate_steps: int = 1) -> np.ndarray:
    """The indices in the global batch that this host's devices work on, in device order.

    Microbatch j is block j of the global batch, and every device takes its part of every
    microbatch; so a microbatch is the same set of examples on any number of devices.

    Returns:
        `[batch_size / hosts]` int32.
    """
    devices = jax.device_count()
    index = np.arange(batch_size, dtype=np.int32).reshape(accumulate_steps, devices, -1)
    per_device = index.transpose(1, 0, 2).reshape(devices, -1)
    # pmap's axis runs over the hosts in turn, whatever order the devices are numbered in.
    axis = [d for host in range(jax.process_count()) for d in jax.local_devices(host)]
    mine = [i for i, d in enumerate(axis) if d.process_index == jax.process_index()]
    return per_device[mine].reshape(-1)


def shard(batch: Any) -> Any:
    """`[host batch, ...]` arrays to `[local devices, host batch / local devices, ...]`."""
    local = jax.local_device_count()
    return jax.tree.map(lambda x: np.reshape(x, (local, -1, *x.shape[1:])), batch)


# ------------------------------------------------------------------------ replication


def replicate(make: Callable[..., Any], *args: Any) -> Any:
    """Runs `make(*args)` on every device: the result, replicated, has a leading device axis.

    Making a state in place costs no transfer; `replicate(lambda s: s, state)` copies one.
    """
    each = jax.pmap(lambda _, args: make(*args), axis_name=AXIS_NAME, in_axes=(0, None))
    return each(np.zeros(jax.local_device_count(), np.float32), args)


def unreplicate(tree: Any) -> Any:
    """The first local device's copy of a replicated tree, on the host: arrays of their own.

    Reads the shard in place, since `x[0]` on such an array would gather it first, and starts all
    transfers before it waits for one. The copies stay valid when the tree is donated.
    """
    shards = local_copy(tree)
    jax.tree.map(lambda shard: shard.copy_to_host_async(), shards)
    return jax.tree.map(lambda shard: np.array(np.asarray(shard)[0]), shards)


def local_copy(tree: Any) -> Any:
    """The first local device's copy of a replicated tree, there, with a leading axis of 1."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def gather_rows(tree: Any, index: np.ndarray) -> Any:
    """`[devices, V, b, ...]` outputs of a step to the rows of the global batch, `[V, B, ...]`.

    Args:
        tree: a step's outputs.
        index: `[host batch]`, the places in the global batch of the rows that this host gave in.

    Returns:
        Host arrays, in the order of the global batch, the same on every host.
    """
    shards = jax.tree.map(lambda x: [shard.data for shard in x.addressable_shards], tree)
    jax.tree.map(lambda shard: shard.copy_to_host_async(), shards)

    def rows_first(parts: list[jax.Array]) -> np.ndarray:
        return np.concatenate([np.asarray(part)[0].swapaxes(0, 1) for part in parts])

    rows = jax.tree.map(rows_first, shards, is_leaf=lambda x: isinstance(x, list))
    rows, index = hosts.gather_hosts((rows, index))
    order = np.argsort(index)
    return jax.tree.map(lambda x: x[order].swapaxes(0, 1), rows)


def use_engine(name: str) -> None:
    """Chooses what training steps are mapped with from now on, of `ENGINES`.

    Raises:
        UserError: there is none of that name.
    """
    global _engine
    if name not in ENGINES:
        raise UserError(f"--parallel={name}: must be one of {', '.join(ENGINES)}")
    _engine = name


def step_over_devices(
    train_step: Callable[..., Any], engine: str | None = None
) -> Callable[..., Any]:
    """`train_step(state, batch, axis_name=...)` over all devices, its state donated.

    Args:
        train_step: of one device's state and part of the batch.
        engine: of `ENGINES`; None for the one that `use_engine` chose.

    Returns:
        A function of a replicated state and a batch from `shard`, both with a leading device axis,
        as its results have.
    """
    step = functools.partial(train_step, axis_name=AXIS_NAME)
    if (engine or _engine) == "pmap":
        return jax.pmap(step, axis_name=AXIS_NAME, donate_argnums=(0,))

    def on_each(state: Any, batch: Any) -> Any:
        result = step(*jax.tree.map(lambda x: x[0], (state, batch)))
        return jax.tree.map(lambda x: x[None], result)

    axis = [d for host in range(jax.process_count()) for d in jax.local_devices(host)]
    mesh = jax.sharding.Mesh(np.array(axis), (AXIS_NAME,))
    spec = jax.sharding.PartitionSpec(AXIS_NAME)
    # The step says itself what is equal on all devices; with check_vma's default a gradient by
    # replicated parameters would be summed over the devices before the step takes its mean.
    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped, donate_argnums=(0,))
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def run(state: Any, batch: Any) -> Any:
        batch = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
        )
        return compiled(state, batch)

    return run


def pmap_over_local(
    fn: Callable[..., Any],
) -> Callable[[Any], Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]]:
    """Maps `fn(shared, rows)` over this host's devices: `bind(shared)` maps a stream of rows.

    `shared` is sent to the devices once, when it is bound. The rows, `[rows, ...]` host arrays, are
    padded with copies of the last to a multiple of the devices and to the size of the largest call
    so far, so that one trace serves a whole data set, its shorter last batch included. While the
    devices work on one item the next is fetched.
    """
    devices = jax.local_devices()
    mapped = jax.pmap(fn, devices=devices)
    place = jax.pmap(lambda _, shared: shared, in_axes=(0, None), devices=devices)
    padded_rows = 0

    def begin(shared: Any, rows: np.ndarray) -> tuple[jax.Array, int]:
        nonlocal padded_rows
        padded_rows = max(padded_rows, -(-len(rows) // len(devices)) * len(devices))
        padding = [(0, padded_rows - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        padded = np.pad(rows, padding, mode="edge") if padded_rows > len(rows) else rows
        return mapped(shared, padded.reshape(len(devices), -1, *rows.shape[1:])), len(rows)

    def finish(out: jax.Array, count: int) -> np.ndarray:
        shards = jax.device_get([shard.data[0] for shard in out.addressable_shards])
        return np.concatenate(shards)[:count]

    def stream(shared: Any, items: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        waiting: collections.deque = collections.deque()
        for rows in items:
            waiting.append(begin(shared, rows))
            if len(waiting) > 1:
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())

    def bind(shared: Any) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
        return functools.partial(stream, place(np.zeros(len(devices), np.float32), shared))

    return bind


class RowsPart(NamedTuple):
    """A device's part of a table, cut into blocks.

    Attributes:
        rows: `[blocks, c, ...]`.
        numbers: `[blocks, c]` int32, the rows' places in the table; -1 for what only fills up.
    """

    rows: Any
    numbers: Any


def spread_rows(table: np.ndarray, block: int) -> RowsPart:
    """Cuts a table `[N, ...]` up among this host's devices, in blocks of at most `block` rows.

    Returns:
        Its parts with a leading device axis, each on its device.
    """
    devices = jax.local_devices()
    each = -(-len(table) // len(devices))
    block = min(block, each)
    blocks = -(-each // block)
    padding = blocks * block * len(devices) - len(table)
    shape = (len(devices), blocks, block)
    rows = np.pad(table, [(0, padding)] + [(0, 0)] * (table.ndim - 1))
    numbers = np.pad(np.arange(len(table), dtype=np.int32), (0, padding), constant_values=-1)
    part = RowsPart(rows.reshape(*shape, *table.shape[1:]), numbers.reshape(shape))
    return _placed()(part)


@functools.cache  # so that tables of one shape are compiled for once
def _placed() -> Callable[..., Any]:
    return jax.pmap(lambda x: x, devices=jax.local_devices())


def pmap_parts(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `fn(part, shared)` over this host's devices, each with its part of `spread_rows`."""
    return jax.pmap(fn, in_axes=(0, None), devices=jax.local_devices())


def pmap_reduce(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `fn(parts, shared, axis_name)` over this host's devices; the first's result.

    `fn` makes its results equal on all devices by means over the axis.
    """
    devices = jax.local_devices()
    mapped = jax.pmap(
        functools.partial(fn, axis_name=AXIS_NAME),
        axis_name=AXIS_NAME,
        in_axes=(0, None),
        devices=devices,
    )
    return lambda parts, shared: unreplicate(mapped(parts, shared))
