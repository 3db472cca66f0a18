"""Several steps in one call of the devices: nothing but the time may depend on it."""

from __future__ import annotations

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from conftest import StandIn, assert_close, assert_same
from tiny_runs import recorded, write_images

from selfsup_jax.data import inputs
from selfsup_jax.data.batches import epoch_order
from selfsup_jax.devices import parallel
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.state import TrainState
from selfsup_jax.training import calls, loop, pretrain

TOTAL = 20
LOG, SAVE = 9, 11  # so that calls of 4 and of 7 steps must end early, and the total is no multiple


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 3, 90)


# ------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("seed", range(50))
def test_calls_cover_all_steps_and_end_where_the_host_has_something_to_do(seed):
    rng = np.random.default_rng(seed)
    first, most = int(rng.integers(0, 50)), int(rng.integers(1, 12))
    total = first + int(rng.integers(0, 100))
    due = {step for step in range(total + 20) if rng.random() < rng.choice([0.02, 0.2, 0.8])}
    counts = list(calls.lengths(first, total, most, due.__contains__))
    ends = [first + int(n) for n in np.cumsum(counts)]
    assert all(1 <= count <= most for count in counts)
    assert first + sum(counts) == total
    assert {step for step in due if first < step <= total} <= set(ends)
    # None is shorter than it must be.
    for count, end in zip(counts, ends, strict=True):
        assert count == most or end in due or end == total


def test_there_is_a_call_for_each_step_by_default_on_the_cpu():
    assert list(calls.lengths(3, 8, 0, lambda step: False)) == [1] * 5
    config = tiny_runs.byol.get_config("demo")
    assert config.steps_per_call == 0
    assert calls.steps_per_call(config, inputs.Feed()) == 0
    assert calls.steps_per_call(config, inputs.Feed(arrays=())) == 0
    config.steps_per_call = 7
    assert calls.steps_per_call(config, inputs.Feed()) == 7


def test_an_accelerator_with_the_data_does_many_steps_in_a_call(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = tiny_runs.byol.get_config("demo")
    assert calls.steps_per_call(config, inputs.Feed(arrays=())) > 1
    assert calls.steps_per_call(config, inputs.Feed()) == 0
    config.steps_per_call = 3
    assert calls.steps_per_call(config, inputs.Feed(arrays=())) == 3


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture
def lengths(monkeypatch):
    """The number of steps of each call."""
    found = []
    call = calls.Call.__call__

    def spy(self, state, batches):
        found.append(len(batches))
        return call(self, state, batches)

    monkeypatch.setattr(calls.Call, "__call__", spy)
    return found


def tiny_config(images, **changes):
    fields = {
        "steps": TOTAL,
        "log_every_steps": LOG,
        "checkpoint_every_steps": SAVE,
        "keep_every_steps": SAVE,
        "monitor__diagnostics_every_steps": LOG,
    }
    return tiny_runs.tiny_config(images, **(fields | changes))


@pytest.mark.slow
def test_steps_in_a_call_change_nothing(images, tmp_path, lengths):
    """States bit by bit, and all that is recorded, diagnostics included."""
    for most, expected in {
        1: [1] * TOTAL,
        4: [1, 4, 4, 2, 4, 3, 2],  # to 1, 5, 9 (log), 11 (save), 15, 18 (log), 20
        7: [1, 7, 1, 2, 7, 2],
    }.items():
        lengths.clear()
        config = tiny_config(images, steps_per_call=most)
        pretrain.pretrain(config, str(tmp_path / str(most)), tiny_runs.build)
        assert lengths == expected
    lines = recorded(tmp_path / "1")
    assert [line["step"] for line in lines] == [9, 18, 20]
    assert all("projection_std" in line for line in lines)  # of that step's outputs
    for name in ("4", "7"):
        written = [tiny_runs.metrics_text(tmp_path / run) for run in (name, "1")]
        assert written[0] == written[1]
        for step in (11, 20):
            a, b = (tiny_runs.restore(config, tmp_path / run, step) for run in (name, "1"))
            assert_same(a, b)
            assert a.step == step


# A method whose step compiles in a blink, and whose state holds every view that it has seen.


def sums(*_, infinite_at=None):
    """`build` of a method that adds up its views, weighted by step and place in the batch."""

    def init_state(rng):
        params = {"encoder": {"w": jnp.zeros((8, 8, 3))}}
        return TrainState(jnp.int32(0), rng, params, params, params, params, (jnp.zeros(1),))

    def train_step(state, batch, *, axis_name):
        step = state.step + 1
        weights = jnp.cos(step * (batch["index"] + 1.0) + batch["label"])
        views = batch["view_1"] - 0.5 * batch["view_2"].astype(jnp.float32)
        each = jnp.einsum("b,bhwc->hwc", weights, views, precision="highest")
        total = jax.lax.psum(each, axis_name)
        w = 0.9 * state.online_params["encoder"]["w"] + total
        loss = jnp.where(step == infinite_at, jnp.inf, total.mean())
        metrics = {
            "loss": loss,
            "step": 1.0 * step,
            "finite": jnp.isfinite(loss) * 1.0,
            "outputs": (batch["view_1"][None], batch["view_2"][None]),
        }
        return state.replace(step=step, online_params={"encoder": {"w": w}}), metrics

    return StandIn(init_state, train_step)


def sums_config(images, **changes):
    return tiny_config(images, monitor__diagnostics_every_steps=0, **changes)


def final_state(workdir, step=TOTAL):
    checkpoints = loop.Checkpoints(str(workdir), keep=9)
    state = checkpoints.restore(jax.eval_shape(sums().init_state, jax.random.PRNGKey(0)), step)
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """By placement: the workdir of a whole run with a step per call."""
    root = tmp_path_factory.mktemp("undisturbed")
    for placement in ("device", "host"):
        config = sums_config(images, data__placement=placement, steps_per_call=1)
        pretrain.pretrain(config, str(root / placement), sums)
    return root


@pytest.mark.slow
def test_a_step_per_call_needs_no_loop(images, tmp_path, undisturbed):
    config = sums_config(images, steps_per_call=0)
    pretrain.pretrain(config, str(tmp_path), sums)
    assert_same(final_state(tmp_path), final_state(undisturbed / "device"))
    steps = [line["step"] for line in recorded(tmp_path)]
    assert steps == [9, 18, 20]


@pytest.mark.slow
def test_an_array_on_the_host_comes_to_the_same(images, tmp_path, monkeypatch, undisturbed):
    """One that is too large for the devices, so that each batch brings its images."""
    config = sums_config(images, data__device_share=0.0, steps_per_call=4)
    data = inputs.load_data(config.copy_and_resolve_references())
    data = data._replace(train=inputs.decode.into_array(data.train))
    feed = inputs.feed(config, data.train)
    assert feed.views is not None and feed.arrays is None
    monkeypatch.setattr(inputs, "load_data", lambda config: data)
    pretrain.pretrain(config, str(tmp_path), sums)
    assert_same(final_state(tmp_path), final_state(undisturbed / "device"))
    written = [tiny_runs.metrics_text(path) for path in (tmp_path, undisturbed / "device")]
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.parametrize(("most", "placement"), [(4, "device"), (7, "host")])
def test_a_run_that_was_stopped_within_a_call_comes_to_the_same(
    images, tmp_path, monkeypatch, undisturbed, lengths, most, placement
):
    """The call is finished and saved; the next process begins there with calls of its own."""
    train_batches = inputs.train_batches

    def signalled(config, data, first_step):
        for step, batch in enumerate(train_batches(config, data, first_step), first_step + 1):
            if step == 13 and first_step == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(inputs, "train_batches", signalled)
    config = sums_config(images, data__placement=placement, steps_per_call=most)
    with pytest.raises(Stopped):
        pretrain.pretrain(config, str(tmp_path), sums)
    stopped = tiny_runs.saved_steps(tmp_path)[-1]
    assert stopped == {4: 15, 7: 18}[most] == sum(lengths)
    assert_same(final_state(tmp_path, 11), final_state(undisturbed / placement, 11))
    pretrain.pretrain(config, str(tmp_path), sums)
    assert sum(lengths) == TOTAL
    assert_same(final_state(tmp_path), final_state(undisturbed / placement))
    whole = tiny_runs.metrics_text(undisturbed / placement)
    assert tiny_runs.metrics_text(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("step", "placement"), [(2, "device"), (13, "host"), (17, "device")])
def test_a_step_within_a_call_that_is_not_finite_is_named(images, tmp_path, step, placement):
    """With the images of its own batch, and before anything after it is recorded or saved."""
    config = sums_config(images, data__placement=placement, steps_per_call=7)
    build = functools.partial(sums, infinite_at=step)
    with pytest.raises(UserError, match=rf"^step {step} is not finite: loss inf;"):
        pretrain.pretrain(config, str(tmp_path), build)
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["step"] == step == found["metrics"]["step"]
    data = inputs.load_data(config.copy_and_resolve_references())
    epoch, place = divmod(step - 1, data.train.num_examples // 16)
    order = epoch_order(data.train.num_examples, config.seed, epoch)
    names = [data.train.describe(int(i)) for i in order[16 * place : 16 * place + 16]]
    assert found["images"] == names
    assert [line["step"] for line in recorded(tmp_path)] == [s for s in (9,) if s < step]
    assert tiny_runs.saved_steps(tmp_path) == [s for s in (11,) if s < step]


# ---------------------------------------------------------------------- devices and engines


@pytest.fixture
def use_devices(monkeypatch):
    """`use_devices(n)`: from here on there are only so many of the simulated devices."""
    devices = jax.local_devices()

    def use(count: int) -> None:
        monkeypatch.setattr(jax, "device_count", lambda: count)
        monkeypatch.setattr(jax, "local_device_count", lambda: count)
        monkeypatch.setattr(jax, "local_devices", lambda *_, **__: devices[:count])

    return use


@pytest.mark.slow
def test_devices_and_engines_see_the_same_views(images, use_devices):
    """Of each place in the global batch bit by bit, with images and boxes from either side."""
    config = sums_config(images).copy_and_resolve_references()
    data = inputs.load_data(config)
    found = {}
    cases = [(0.25, "pmap", 1), (0.25, "pmap", 2), (0.25, "pmap", 4), (0.25, "pmap", 8)]
    cases += [(0.25, "shard_map", 1), (0.25, "shard_map", 8), (0.0, "pmap", 8)]
    for share, engine, count in [*cases, (0.0, "shard_map", 4)]:
        config.data.device_share = share
        use_devices(count)
        parallel.use_engine(engine)
        try:
            feed = inputs.feed(config, data.train)
            assert (feed.arrays is None) == (share == 0)
            call = calls.Call(sums().train_step, feed, 3)
            state = parallel.replicate(sums().init_state, jax.random.PRNGKey(0))
            batches = inputs.train_batches(config, data, 0)
            for steps in (3, 2):
                given = [next(batches) for _ in range(steps)]
                for batch in given:
                    del batch["name"]
                state, metrics, outputs = call(state, given)
            assert metrics["loss"].shape == (count, 3)
            views = parallel.gather_rows(outputs, given[-1]["index"])
            rows = parallel.unreplicate(metrics)["step"]
            assert rows[:2].tolist() == [4, 5]
        finally:
            parallel.use_engine("pmap")
        found[share, engine, count] = views, parallel.unreplicate(state)
    views, state = found[0.25, "pmap", 8]
    assert views[0].shape == (1, 16, 8, 8, 3) and len(np.unique(views[0])) > 50
    for name, (other_views, other_state) in found.items():
        assert_same(other_views, views)
        assert other_state.step == 5, name
        # Sums over devices are rounded in another order.
        assert_close(other_state.online_params, state.online_params)
