"""The same mathematics on any number of devices, microbatches and processes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from conftest import (
    MEAN,
    NO_AUGMENTATION,
    REPOSITORY,
    STD,
    assert_close,
    assert_same,
    flatten,
    process_env,
    random_batch,
    replicated,
    tiny_method,
    tiny_step,
)
from ml_collections import ConfigDict

from selfsup_jax.data.augment import Augmentation
from selfsup_jax.devices import collectives, hosts, parallel
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.errors import UserError
from selfsup_jax.models import resnet
from selfsup_jax.run.checkpoint import Checkpoints
from selfsup_jax.run.metrics import read_history

BATCH = 16
# Cheap to compile, and random: what is drawn for an example must not depend on its device.
AUGMENT = dataclasses.replace(NO_AUGMENTATION, flip_prob=0.5, grayscale_prob=0.4, solarize_prob=0.5)


# --------------------------------------------------------------- devices and microbatches


def spread(batch, devices, accumulate_steps):
    """The global batch as `devices` devices hold it: a part of every microbatch for each."""

    def rows(x):
        x = x.reshape(accumulate_steps, devices, -1, *x.shape[1:])
        return np.swapaxes(x, 0, 1).reshape(devices, -1, *x.shape[3:])

    return jax.tree.map(rows, batch)


@functools.cache
def first_state(networks):
    return jax.device_get(jax.jit(tiny_method(networks).init_state)(jax.random.PRNGKey(0)))


@functools.cache
def two_updates(networks, devices, bn_groups, accumulate_steps=1):
    """State, metrics and outputs after two updates; `devices` 0 is plain `jax.jit` without an axis.

    The outputs are of the global batch, `[2, B, ...]`, in its order.
    """
    made = tiny_method(
        networks,
        schedule=optax.constant_schedule(0.05),  # small: far steps would blow up the rounding
        augment=Augmentation({"global": (AUGMENT, AUGMENT)}, MEAN, STD),
        bn_groups=bn_groups,
        accumulate_steps=accumulate_steps,
    )
    step, state = made.train_step, first_state(networks)
    batches = [random_batch(BATCH, seed=k) for k in range(2)]
    if devices == 0:
        run = jax.jit(step)
        for batch in batches:
            state, metrics = run(state, batch)
        outputs = metrics.pop("outputs")
        return jax.device_get((state, metrics, outputs))

    run = jax.pmap(
        functools.partial(step, axis_name="d"), axis_name="d", devices=jax.devices()[:devices]
    )
    state = replicated(state, devices, "d")
    for batch in batches:
        state, metrics = run(state, spread(batch, devices, accumulate_steps))
    order = spread(np.arange(BATCH), devices, accumulate_steps).reshape(-1)
    outputs = parallel.gather_rows(metrics.pop("outputs"), order)
    per_device = jax.device_get((state, metrics))
    first = jax.tree.map(lambda x: x[0], per_device)
    for device in range(1, devices):  # replicas never drift apart
        assert_same(jax.tree.map(lambda x, d=device: x[d], per_device), first)
    return *first, outputs


def assert_states_agree(got, expected, stats=True):
    (a, a_metrics, a_outputs), (b, b_metrics, b_outputs) = got, expected
    assert_close(a_metrics, b_metrics, floor=1e-2)
    assert all(x.shape[:2] == (2, BATCH) for x in a_outputs)
    assert_close(a_outputs, b_outputs, floor=0.1)
    for field in ("online_params", "target_params"):
        assert_close(getattr(a, field), getattr(b, field), floor=0.1)
    assert_close(a.opt_state, b.opt_state, floor=1.0)  # sums of gradients of that size
    if stats:
        for field in ("online_stats", "target_stats"):
            assert_close(getattr(a, field), getattr(b, field), floor=0.1)
    assert a.step == b.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("bn_groups", [1, 4])
def test_devices_do_not_change_the_update(networks, devices, bn_groups):
    """Metrics, outputs, parameters, target, averages and momentum after two global batches."""
    assert_states_agree(
        two_updates(networks, devices, bn_groups), two_updates(networks, 0, bn_groups)
    )


@pytest.mark.slow
def test_groups_do_change_the_update(networks):
    """So that the test above compares two different computations."""
    one, four = (two_updates(networks, 0, groups)[0].online_params for groups in (1, 4))
    difference = one["encoder"]["conv"]["kernel"] - four["encoder"]["conv"]["kernel"]
    assert np.abs(difference).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("devices", [0, 2, 4])
def test_microbatches_do_not_change_the_update(networks, devices):
    """Two microbatches of two groups each are one batch of four groups.

    All but the running averages, which take a step for each microbatch.
    """
    accumulated = two_updates(networks, devices, bn_groups=4, accumulate_steps=2)
    assert_states_agree(accumulated, two_updates(networks, 0, bn_groups=4), stats=False)


@pytest.mark.slow
def test_microbatches_on_any_devices_leave_the_same_averages(networks):
    expected = two_updates(networks, 0, bn_groups=4, accumulate_steps=2)
    for devices in (2, 4):
        got = two_updates(networks, devices, bn_groups=4, accumulate_steps=2)
        assert_states_agree(got, expected)


@pytest.mark.slow
def test_microbatches_move_the_averages_in_turn(networks, initial_state):
    """As two passes over the two halves of the batch would."""
    step, optimizer = tiny_step(networks, bn_groups=2, accumulate_steps=2)
    state = initial_state.replace(opt_state=optimizer.init(initial_state.online_params))
    batch = random_batch(BATCH, seed=0)
    accumulated = jax.jit(step)(state, batch)[0]

    step, _ = tiny_step(networks)
    run = jax.jit(step)
    for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        after = run(state, {k: v[half] for k, v in batch.items()})[0]
        # The averages go on, the parameters are those from before the update.
        state = state.replace(online_stats=after.online_stats, target_stats=after.target_stats)
    assert_close(accumulated.online_stats, state.online_stats, floor=0.1)
    assert_close(accumulated.target_stats, state.target_stats, floor=0.1)


def test_accumulate_means_and_carries_on():
    def step(carry, part):
        return carry + part.sum(), {"mean": part.mean(), "carry": carry}, {}

    rows = jnp.arange(8.0)
    carry, means, _ = collectives.accumulate(step, jnp.float32(1), rows, 4)
    assert carry == 1 + 28
    assert means["mean"] == 3.5
    assert means["carry"] == np.mean([1, 2, 7, 16])  # before each pair of rows
    carry, means, _ = collectives.accumulate(step, jnp.float32(1), rows, 1)
    assert (carry, means["mean"], means["carry"]) == (29, 3.5, 1)


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_accumulate_keeps_the_order_of_rows(microbatches):
    """Row i of every view is that of the batch's example i, however it was cut."""

    def step(carry, part):
        views = jnp.stack([part, 100 + part, 200 + part])  # [V, b, 2]
        return carry, {}, {"views": views, "sums": views.sum(-1)}

    batch = jnp.arange(16.0).reshape(8, 2)
    rows = collectives.accumulate(step, (), batch, microbatches)[2]
    expected = np.stack([batch, 100 + batch, 200 + batch])
    np.testing.assert_array_equal(rows["views"], expected)
    np.testing.assert_array_equal(rows["sums"], expected.sum(-1))


# ----------------------------------------------------------------------- the global batch


@pytest.mark.parametrize(
    ("batch", "accumulate_steps"), [(8, 1), (16, 1), (16, 2), (96, 3), (64, 8)]
)
def test_host_positions(batch, accumulate_steps):
    """Every index once, and microbatch j is block j of the batch on any number of devices."""
    devices = jax.device_count()
    positions = parallel.host_positions(batch, accumulate_steps)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(np.sort(positions), np.arange(batch))
    microbatches = positions.reshape(devices, accumulate_steps, -1)
    block = batch // accumulate_steps
    for j in range(accumulate_steps):
        found = microbatches[:, j].reshape(-1)
        np.testing.assert_array_equal(found, np.arange(j * block, (j + 1) * block))
    # The layout that the tests above spread their batches in.
    ours = spread(np.arange(batch, dtype=np.int32), devices, accumulate_steps)
    np.testing.assert_array_equal(positions, ours.reshape(-1))


def test_shard_keeps_the_order_of_positions():
    positions = parallel.host_positions(32)
    sharded = parallel.shard({"index": positions})["index"]
    assert sharded.shape == (8, 4)
    np.testing.assert_array_equal(sharded.reshape(-1), positions)


@pytest.mark.parametrize(
    ("batch", "accumulate_steps", "bn_groups", "message"),
    [
        (20, 1, 1, "batch_size=20.*nearest: 16"),
        (24, 2, 1, "batch_size=24.*multiple of 16.*nearest: 32"),
        (4, 1, 1, "batch_size=4.*nearest: 8"),
        (32, 2, 3, "bn_groups=3.*accumulate_steps=2"),
        (32, 1, 3, "bn_groups=3.*batch_size=32"),
        (48, 1, 3, "bn_groups=3.*8 devices"),
        (48, 1, 12, "bn_groups=12.*8 devices"),
    ],
)
def test_batches_that_do_not_divide(batch, accumulate_steps, bn_groups, message):
    with pytest.raises(UserError, match=message):
        parallel.check_batch(batch, accumulate_steps, bn_groups)


@pytest.mark.parametrize(
    ("batch", "accumulate_steps", "bn_groups"),
    [(8, 1, 1), (32, 2, 1), (32, 2, 4), (16, 1, 16), (32, 1, 4), (48, 1, 8)],
)
def test_batches_that_divide(batch, accumulate_steps, bn_groups):
    parallel.check_batch(batch, accumulate_steps, bn_groups)


# -------------------------------------------------------------- replication and collectives


def test_replicate_and_unreplicate(initial_state):
    replicated = parallel.replicate(lambda s: s, initial_state)
    for leaf, single in zip(
        jax.tree.leaves(replicated), jax.tree.leaves(initial_state), strict=True
    ):
        assert leaf.shape == (8, *single.shape)
        assert {s.device for s in leaf.addressable_shards} == set(jax.devices())
    single = parallel.unreplicate(replicated)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(single))
    assert_same(single, initial_state)


def test_what_was_unreplicated_outlives_a_donated_state():
    replicated = parallel.replicate(lambda: {"x": jnp.arange(6.0), "step": jnp.int32(3)})
    single = parallel.unreplicate(replicated)
    add = parallel.step_over_devices(
        lambda state, x, axis_name: jax.tree.map(lambda s: s + x[0], state)
    )
    for _ in range(3):
        replicated = add(replicated, np.full((8, 1), 7, np.int32))
    assert parallel.unreplicate(replicated)["step"] == 3 + 3 * 7
    np.testing.assert_array_equal(single["x"], np.arange(6))
    assert single["step"] == 3
    single["x"][:] = 0  # and is the caller's own


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_gathered_rows_come_in_the_order_of_the_global_batch(devices):
    index = np.random.default_rng(0).permutation(16)  # whichever device holds them
    batch = index.astype(np.float32).reshape(devices, -1)

    def outputs(x):
        return {
            "scalars": jnp.stack([x, -x]),
            "vectors": jnp.stack([x, -x])[..., None] * np.ones(3),
        }

    mapped = jax.pmap(outputs, devices=jax.devices()[:devices])
    rows = parallel.gather_rows(mapped(batch), index)
    expected = np.stack([np.arange(16), -np.arange(16)])
    assert all(type(x) is np.ndarray for x in rows.values())
    np.testing.assert_array_equal(rows["scalars"], expected)
    np.testing.assert_array_equal(rows["vectors"], np.repeat(expected[..., None], 3, axis=-1))


def test_replicate_makes_in_place():
    made = parallel.replicate(jax.random.normal, jax.random.PRNGKey(3))
    expected = jax.random.normal(jax.random.PRNGKey(3))
    np.testing.assert_array_equal(np.asarray(made), np.full(8, expected))


@pytest.mark.parametrize(
    ("bn_groups", "devices", "local_groups", "sharing"),
    [(1, 8, 1, None), (4, 8, 1, 2), (8, 8, 1, 1), (16, 8, 2, 1), (4, 2, 2, 1), (4, 1, 4, 1)],
)
def test_batch_layout(bn_groups, devices, local_groups, sharing):
    found = []

    def note(x):
        layout = collectives.batch_layout(bn_groups, 2, "d")
        found.append(layout)
        return layout.mean(x)

    mapped = jax.pmap(note, axis_name="d", devices=jax.devices()[:devices])
    mean = mapped(np.arange(devices, dtype=np.float32))
    assert found[0].groups == local_groups and found[0].num_views == 2
    span = sharing or devices
    expected = np.arange(devices).reshape(-1, span).mean(1).repeat(span)
    np.testing.assert_array_equal(np.asarray(mean), expected)


def test_layout_without_an_axis_holds_every_group():
    assert collectives.batch_layout(4, 2, None) == BatchLayout(2, 4, None, ((0,),))


def test_one_host_needs_no_others():
    tree = {"x": np.arange(3)}
    assert hosts.gather_hosts(tree) is tree
    hosts.wait_for_all("nobody")
    assert hosts.is_writer()
    assert not hosts.reached_preemption(1)


# ------------------------------------------------------------------------------ processes


def start_run(workdir, name, process_id=None, port=None, devices=1):
    command = [
        sys.executable,
        "tests/tiny_process.py",
        f"--config=configs/{name}.py:demo",
        f"--workdir={workdir}",
        "--compilation_cache=",
        # BYOL with networks that compile at once; MoCo with its own, but one block.
        *["--config.encoder.depth=2"] * (name == "moco"),
        "--config.encoder.width=0.0625",
        "--config.data.image_size=8",
        "--config.data.test_resize=8",
        "--config.batch_size=16",
        "--config.steps=8",
        "--config.optimizer.warmup_steps=1",
        "--config.projector.hidden_sizes=(16,)",
        *["--config.predictor.hidden_sizes=(16,)"] * (name == "byol"),
        "--config.eval.enabled=False",
        "--config.log_every_steps=1",
        "--config.monitor.diagnostics_every_steps=1",
        "--config.monitor.knn_every_steps=4",
        "--config.monitor.plots_every_steps=5",
        "--config.monitor.knn_train_images=48",
        "--config.monitor.map_images=24",
    ]
    if process_id is not None:
        command += [
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={process_id}",
        ]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=process_env(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(processes, timeout=300):
    """The output of each, once all have ended well."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def logged_losses(workdir):
    """What the run's TensorBoard events hold, in float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir))
    events.Reload()
    return {e.step: e.value for e in events.Scalars("train/loss")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byol", "moco"])  # MoCo uses every collective
def test_two_processes_are_one_run(name, tmp_path, monkeypatch):
    """Two processes of one device each do what one with two does, from flags to checkpoint.

    Bit for bit: what rounds otherwise in one of them would grow with the steps.
    """
    monkeypatch.setitem(resnet.STAGES, 2, tiny_runs.ONE_BLOCK)
    port = free_port()
    two, other = wait_for([start_run(tmp_path / "two", name, i, port) for i in range(2)])
    (one,) = wait_for([start_run(tmp_path / "one", name, devices=2)])

    # Only one process speaks; the numbers are those of the run without another.
    steps = [len(re.findall(r"loss \d", said)) for said in (one, two, other)]
    assert steps == [8, 8, 0]
    alone, together = (logged_losses(tmp_path / run) for run in ("one", "two"))
    assert sorted(alone) == list(range(1, 9)) and together == alone

    # So are all the others, and what was measured of the global batch on the host.
    alone, together = (read_history(tmp_path / run) for run in ("one", "two"))
    assert alone.keys() == together.keys() > {"grad_norm/encoder", "effective_rank", "uniformity"}
    for key, (steps, values) in alone.items():
        assert together[key][0] == steps == list(range(1, 9))
        np.testing.assert_allclose(together[key][1], values, rtol=1e-4, atol=1e-6, err_msg=key)
    pictures = [sorted(p.name for p in tmp_path.glob(f"{n}/plots/*.png")) for n in ("one", "two")]
    assert pictures[0] == pictures[1] and "representation_map.png" in pictures[0]

    # The checkpoints are read back by what the run wrote of its config.
    config = ConfigDict(json.loads((tmp_path / "two" / "config.json").read_text()))
    method_of = importlib.import_module(f"{name}_jax.method")
    make = tiny_runs.build if name == "byol" else method_of.build
    build = make(config, num_classes=10, total_steps=8, warmup_steps=1)
    init = build.init_state(jax.random.PRNGKey(config.seed))
    states = []
    for folder in ("one", "two"):
        checkpoints = Checkpoints(str(tmp_path / folder))
        assert checkpoints.latest_step == 8
        states.append(checkpoints.restore(init))
        checkpoints.close()
    alone, together = states
    assert together.step == 8
    jax.tree.map(np.testing.assert_array_equal, together, alone)
    kernel = "encoder/conv/kernel" if name == "byol" else "encoder/stem/kernel"
    start, end = (flatten(state.online_params)[kernel] for state in (init, alone))
    assert np.abs(end - start).max() > 1e-3

    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["device_count"] == 2 and results["steps"] == 8


@pytest.mark.slow
def test_shard_maps_default_sums_gradients_of_replicated_parameters():
    """Why a step is mapped with `check_vma=False`: with the default its mean is a sum."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("d",))
    each, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    x = jnp.arange(8.0)

    def gradient(w, x):
        return jax.lax.pmean(jax.grad(lambda w: (w * x).mean())(w), "d")

    for check_vma, expected in ((False, x.mean()), (True, 4 * x.mean())):
        mapped = jax.shard_map(
            gradient, mesh=mesh, in_specs=(whole, each), out_specs=whole, check_vma=check_vma
        )
        np.testing.assert_allclose(mapped(jnp.float32(2.0), x), expected)
