"""Devices and hosts: the only file that uses pmap, the axis name and replication.

The collectives inside a training step are in `collectives.py`.

A *global batch* of B examples is divided among all devices of all hosts. The random draws of an
example are keyed by its index in the global batch, and batch-norm groups are parts of the global
batch. So the number of devices changes speed and memory, but not the mathematics.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from selfsup_jax.devices import hosts
from selfsup_jax.devices.collectives import groups_of_microbatch
from selfsup_jax.errors import UserError, bad_field

AXIS_NAME = "devices"
ENGINES = ("pmap", "shard_map")
_engine = "pmap"  # see `use_engine`


# ------------------------------------------------------------------- the global batch


def check_batch(
    batch_size: int, accumulate_steps: int, bn_groups: int, devices: int | None = None
) -> None:
    """Checks that the global batch divides over devices, microbatches and batch-norm groups.

    Args:
        batch_size, accumulate_steps, bn_groups: as in a config.
        devices: how many; None for all that are attached.

    Raises:
        UserError: it does not; the message has the field and what would be valid.
    """
    devices = devices or jax.device_count()
    unit = devices * accumulate_steps
    if batch_size % unit:
        parts = f"(devices {devices} x accumulate_steps {accumulate_steps})"
        nearest = max(1, round(batch_size / unit)) * unit
        valid = f"must be a multiple of {unit} {parts}; nearest: {nearest}"
        raise bad_field("batch_size", batch_size, valid)
    if bn_groups % accumulate_steps and bn_groups != 1:
        valid = f"must be 1 or a multiple of accumulate_steps={accumulate_steps}"
        raise bad_field("bn_groups", bn_groups, valid)
    groups = groups_of_microbatch(bn_groups, accumulate_steps)
    if (batch_size // accumulate_steps) % groups:
        raise bad_field("bn_groups", bn_groups, f"must divide batch_size={batch_size}")
    if max(groups, devices) % min(groups, devices):
        valid = f"must divide, or be a multiple of, the {devices} devices"
        raise bad_field("bn_groups", bn_groups, valid)


def host_positions(batch_size: int, accumulate_steps: int = 1) -> np.ndarray:
    """The indices in the global batch that this host's devices work on, in device order.

    Microbatch j is block j of the global batch, and every device gets a part of every microbatch.
    So a microbatch has the same examples on any number of devices.

    Returns:
        `[batch_size / hosts]` int32.
    """
    devices = jax.device_count()
    index = np.arange(batch_size, dtype=np.int32).reshape(accumulate_steps, devices, -1)
    per_device = index.transpose(1, 0, 2).reshape(devices, -1)
    mine = [i for i, d in enumerate(_axis()) if d.process_index == jax.process_index()]
    return per_device[mine].reshape(-1)


def _axis() -> list[jax.Device]:
    """All devices in the order of pmap's axis: by host, even if they are numbered differently."""
    return [d for host in range(jax.process_count()) for d in jax.local_devices(host)]


def _along_axis() -> jax.sharding.NamedSharding:
    """An array's first axis over all devices."""
    mesh = jax.sharding.Mesh(np.array(_axis()), (AXIS_NAME,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS_NAME))


def shard(batch: Any) -> Any:
    """`[host batch, ...]` arrays to `[local devices, host batch / local devices, ...]`."""
    local = jax.local_device_count()
    return jax.tree.map(lambda x: np.reshape(x, (local, -1, *x.shape[1:])), batch)


# ------------------------------------------------------------------------ replication


def replicate(make: Callable[..., Any], *args: Any) -> Any:
    """Runs `make(*args)` on every device; the replicated result has a leading device axis.

    Making a state on the devices needs no transfer; `replicate(lambda s: s, state)` copies one.
    """
    mapped = jax.pmap(lambda _, args: make(*args), axis_name=AXIS_NAME, in_axes=(0, None))
    return mapped(np.zeros(jax.local_device_count(), np.float32), args)


def unreplicate(tree: Any) -> Any:
    """Copies a replicated tree from the first local device to the host.

    Reads the shard directly, because `x[0]` on such an array would gather it first, and starts all
    transfers before it waits for one. The copies stay valid when the tree is donated.
    """
    shards = local_copy(tree)
    jax.tree.map(lambda shard: shard.copy_to_host_async(), shards)
    return jax.tree.map(lambda shard: np.array(np.asarray(shard)[0]), shards)


def local_copy(tree: Any) -> Any:
    """The first local device's copy of a replicated tree, on that device; leading axis of 1."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def gather_rows(tree: Any, index: np.ndarray) -> Any:
    """Gathers a step's outputs `[devices, V, b, ...]` to `[V, B, ...]` of the global batch.

    Args:
        tree: a step's outputs.
        index: `[host batch]`, the positions of this host's rows in the global batch.

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
    """Sets how training steps are mapped over devices from now on: one of `ENGINES`.

    Raises:
        UserError: there is no such engine.
    """
    global _engine
    if name not in ENGINES:
        raise UserError(f"--parallel={name}: must be one of {', '.join(ENGINES)}")
    _engine = name


def step_over_devices(
    train_step: Callable[..., Any], engine: str | None = None, devices: Any = None
) -> Callable[..., Any]:
    """Maps `train_step(state, batch, axis_name=...)` over all devices; the state is donated.

    Args:
        train_step: a function of one device's state and part of the batch.
        engine: one of `ENGINES`; None for the one set by `use_engine`.
        devices: with pmap, which; None for all that are attached.

    Returns:
        A function of a replicated state and a batch from `shard`. Its arguments and results have a
        leading device axis.
    """
    step = functools.partial(train_step, axis_name=AXIS_NAME)
    if (engine or _engine) == "pmap":
        return jax.pmap(step, axis_name=AXIS_NAME, donate_argnums=(0,), devices=devices)

    def on_device(state: Any, batch: Any) -> Any:
        result = step(*jax.tree.map(lambda x: x[0], (state, batch)))
        return jax.tree.map(lambda x: x[None], result)

    sharding = _along_axis()
    mesh, spec = sharding.mesh, sharding.spec
    # The step takes its own means over devices. With check_vma's default, JAX would also sum the
    # gradient of replicated parameters over the devices before that.
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped, donate_argnums=(0,))

    def put(x: Any) -> jax.Array:  # what `replicate` made is on the devices already
        if isinstance(x, jax.Array) and len(x.sharding.device_set) == mesh.size:
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    def run(state: Any, batch: Any) -> Any:
        return compiled(state, jax.tree.map(put, batch))

    run.lower = lambda state, batch: compiled.lower(  # type: ignore[attr-defined]
        state, jax.tree.map(put, batch)
    )
    return run


def pmap_over_local(
    fn: Callable[..., Any],
) -> Callable[[Any], Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]]:
    """Maps `fn(shared, rows)` over this host's devices: `bind(shared)` maps a stream of rows.

    `bind` sends `shared` to the devices once. Each host array `[rows, ...]` is padded with copies
    of its last row to a multiple of the devices and to the size of the largest array so far, so
    that one trace is enough for a whole data set with a smaller last batch. While the devices work
    on one array, the next one is read.
    """
    devices = jax.local_devices()
    mapped = jax.pmap(fn, devices=devices)
    to_devices = jax.pmap(lambda _, shared: shared, in_axes=(0, None), devices=devices)
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
        return functools.partial(stream, to_devices(np.zeros(len(devices), np.float32), shared))

    return bind


@functools.cache  # each function is compiled only once
def pmap_reduce(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `fn(part, shared, axis_name)` over all devices of all hosts; returns the first result.

    `part` has a leading axis of this host's devices; `shared` must be the same on every host. `fn`
    must use collectives over the axis, so that its results are equal on all devices.
    """
    mapped = jax.pmap(
        functools.partial(fn, axis_name=AXIS_NAME), axis_name=AXIS_NAME, in_axes=(0, None)
    )
    reduced = lambda parts, shared: unreplicate(mapped(parts, shared))  # noqa: E731
    reduced.lower = mapped.lower  # type: ignore[attr-defined]
    return reduced


def joined(shards: list[jax.Array]) -> jax.Array:
    """One array of all devices of all hosts from `[1, ...]` on each of this host's devices."""
    shape = (jax.device_count(), *shards[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, _along_axis(), shards)
