"""The loop: stopping and going on, results, what a run leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from conftest import StandIn, TinyEncoder, assert_same, flatten, tiny_networks, with_network
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray
from tiny_runs import build, recorded, write_images

from selfsup_jax.data import inputs, sources
from selfsup_jax.data.augment import augment_views
from selfsup_jax.data.batches import epoch_order
from selfsup_jax.devices import parallel
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.models.network import parts
from selfsup_jax.run import checkpoint
from selfsup_jax.state import TrainState
from selfsup_jax.training import ending, pretrain
from selfsup_jax.viz import plots

STEPS = 6


# -------------------------------------------------------------------------------- tiny runs


class Brittle(nn.Module):
    """An encoder with a parameter that, at 0, leaves the outputs finite and no gradient."""

    num_features: int = 4

    @nn.compact
    def __call__(self, x, layout=None):
        brittle = self.param("brittle", nn.initializers.ones, (1,))
        return TinyEncoder(self.num_features, name="tiny")(x, layout) + 0 * jnp.sqrt(brittle)


def breaking_build(what, step):
    """`build` with a step `step` whose loss, or a gradient alone, is not finite."""

    def make(config, *args):
        built = build(config, *args)
        brittle = with_network(built, encoder=Brittle())

        def train_step(state, batch, *, axis_name):
            params = jax.tree.map(lambda x: x, state.online_params)
            now = state.step == step - 1
            if what == "loss":
                params["projector"]["output"]["kernel"] *= jnp.where(now, jnp.nan, 1)
            elif what == "gradient":
                params["encoder"]["brittle"] *= jnp.where(now, 0, 1)
            state = state.replace(online_params=params)
            return brittle.train_step(state, batch, axis_name=axis_name)

        return StandIn(brittle.init_state, train_step, built.represent, built.augment)

    return make


def counting_build(*_, infinite_at=None):
    """A method whose steps do nothing but count: for what the loop does around them."""

    def init_state(rng):
        params = {"encoder": {"w": jnp.zeros(2)}}
        return TrainState(jnp.int32(0), rng, params, params, params, params, (jnp.zeros(1),))

    def train_step(state, batch, *, axis_name):
        step = state.step + 1
        params = jax.tree.map(lambda x: x + 1, state.online_params)
        loss = jnp.where(step == infinite_at, jnp.inf, step.astype(jnp.float32))
        metrics = {"loss": loss, "finite": jnp.isfinite(loss) * 1.0, "outputs": ()}
        return state.replace(step=step, online_params=params), metrics

    return StandIn(init_state, train_step)


def counting_config(folder, **changes):
    """Without what looks at an encoder; changes go before."""
    off = {"eval.enabled": False, "monitor.diagnostics_every_steps": 0, "keep_every_steps": 0}
    return tiny_config(folder, **(off | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return {
        "labels": write_images(root / "labels", 3, 60),
        "no labels": write_images(root / "no_labels", 0, 40),
    }


def tiny_config(folder, **changes):
    """Of a run that logs each step, saves every second one, and is probed at its end."""
    config = tiny_runs.tiny_config(folder)
    config.steps = STEPS
    config.log_every_steps = 1
    config.checkpoint_every_steps = 2
    config.keep_checkpoints = 9
    config.keep_every_steps = 2  # so that none is put off while another is being written
    config.monitor.diagnostics_every_steps = 2
    config.eval.enabled = True
    config.update_from_flattened_dict(changes)
    return config


def restore(config, workdir, step=None):
    """The state at a step, the newest one by default."""
    like = build(config, 3, STEPS, 2).init_state(jax.random.PRNGKey(config.seed))
    checkpoints = checkpoint.Checkpoints(str(workdir), config.keep_checkpoints)
    state = checkpoints.restore(like, step)
    checkpoints.close()
    return state


class Killed(Exception):
    """In place of whatever ends a process at once."""


def events(workdir):
    """{(tag without its group, step): value} of TensorBoard's scalars, where each is there once."""
    found = {}
    for path in workdir.glob("events.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                key = value.tag.partition("/")[2], event.step
                if event.step:  # the config is at step 0
                    assert key not in found
                    found[key] = make_ndarray(value.tensor).item()
    return found


def check_events(workdir):
    """They hold what `metrics.jsonl` does, and the speed beside it."""
    values = {k: v for k, v in events(workdir).items() if k[0] != "images_per_second"}
    assert not [tag for tag, _ in values if tag.startswith("device_memory")]  # the CPU can't tell
    lines = recorded(workdir)
    expected = {(k, r["step"]): v for r in lines for k, v in r.items() if k != "step"}
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert values[key] == np.float32(value), key


@pytest.fixture(scope="module")
def whole_run(folders, tmp_path_factory):
    """An uninterrupted run: config, workdir, results, and the encoder as the probes got it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    config = tiny_config(folders["labels"])
    probed = []
    evaluate = pretrain.closing.evaluate

    def spy(extract, trained, *args, **kwargs):
        before = jax.tree.map(np.copy, trained)
        results = evaluate(extract, trained, *args, **kwargs)
        probed.append((before, jax.tree.map(np.asarray, trained)))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.closing, "evaluate", spy)
        results = pretrain.pretrain(config, str(workdir), build)
    return config, workdir, results, probed[0]


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt[k] = f`: f is called once, when the loop asks for the batch of step k."""
    calls = {}
    train_batches = inputs.train_batches

    def interrupted(config, data, first_step):
        for step, batch in enumerate(train_batches(config, data, first_step), first_step + 1):
            calls.pop(step, lambda: None)()
            yield batch

    monkeypatch.setattr(inputs, "train_batches", interrupted)
    return calls


@pytest.fixture
def unhandled_signals():
    """A signal that the run does not take fails the test; the run must put these back."""

    def fail(number, frame):
        raise AssertionError(signal.Signals(number))

    before = {s: signal.signal(s, fail) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {s: signal.signal(s, handler) for s, handler in before.items()}
    assert set(after.values()) == {fail}


@pytest.mark.slow
def test_stopping_and_going_on_changes_nothing(
    whole_run, folders, tmp_path, monkeypatch, interrupt, unhandled_signals
):
    """Told to stop in the first epoch, killed in the second and continued: the same in every bit.

    The last state, its numbers, and all that was recorded on the way.
    """
    config, workdir, results, _ = whole_run
    taken = []
    take = checkpoint.Checkpoints.take

    def spy(self, state, meta):
        step = int(parallel.unreplicate(state).step)
        taken.append(step)
        # A checkpoint says that its steps are done: what they were is on the disk by then.
        assert recorded(tmp_path)[-1]["step"] == step and ("loss", step) in events(tmp_path)
        take(self, state, meta)

    monkeypatch.setattr(checkpoint.Checkpoints, "take", spy)
    interrupt[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=f"SIGTERM: .* step 3.*{tmp_path}") as stopped:
        pretrain.pretrain(tiny_config(folders["labels"]), str(tmp_path), build)
    assert stopped.value.status == 143
    assert taken == [2, 3]  # the step that was being done, though no checkpoint was due

    def kill():
        raise Killed

    interrupt[6] = kill
    with pytest.raises(Killed):
        pretrain.pretrain(tiny_config(folders["labels"]), str(tmp_path), build)
    assert taken == [2, 3, 4]
    assert not (tmp_path / "results.json").exists()
    # Step 5 was recorded, and not saved. Such a process may leave half of what it was writing.
    assert [line["step"] for line in recorded(tmp_path)] == [1, 2, 3, 4, 5]
    assert ("loss", 5) in events(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "los')
    last_events = max(tmp_path.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    with open(last_events, "ab") as f:
        f.write(last_events.read_bytes()[-20:-3])

    resumed = pretrain.pretrain(tiny_config(folders["labels"]), str(tmp_path), build)
    assert taken == [2, 3, 4, 6]  # steps 5 and 6 only, none of them twice
    assert tiny_runs.metrics_text(tmp_path) == tiny_runs.metrics_text(workdir)
    check_events(tmp_path)
    check_events(workdir)

    for step in (4, 6):
        assert_same(restore(config, tmp_path, step), restore(config, workdir, step))
    assert resumed.keys() == results.keys()
    for name, value in results.items():
        if name != "images_per_second":
            assert resumed[name] == value, name
    # The run moved between the stop and the end, so that there was something to get wrong.
    four, six = (flatten(restore(config, workdir, step)) for step in (4, 6))
    for name in four:
        if name.startswith((".online_", ".target_")) and not name.endswith("hidden/bias"):
            assert not np.array_equal(four[name], six[name]), name


def test_a_checkpoint_counts_its_updates(whole_run):
    config, workdir, _, _ = whole_run
    for step in (2, 4, 6):
        state = restore(config, workdir, step)
        assert state.step == step
        counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == np.int32]
        assert counts and all(c == step for c in counts)


@pytest.mark.slow
def test_a_finished_run_only_evaluates_again(whole_run, tmp_path, monkeypatch, capfd):
    config, workdir, results, _ = whole_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    monkeypatch.setattr(parallel, "step_over_devices", None)  # nothing is left to train
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.closing, "evaluate", None)  # nor to measure
        assert pretrain.pretrain(tiny_config(config.data.dir), str(copy), build) == results
    told = capfd.readouterr().err
    assert f"{copy}: this run is done, all 6 steps" in told and f"{copy}/results.json" in told
    assert f"--config.init_from={copy}" in told  # the cosine has ended
    assert_same(restore(config, copy), restore(config, workdir))
    assert (copy / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    check_events(copy)
    # With what may change: the config that is written is the new one.
    pretrain.pretrain(tiny_config(config.data.dir, **{"eval.fewshot_draws": 3}), str(copy), build)
    assert json.loads((copy / "config.json").read_text())["eval"]["fewshot_draws"] == 3


def test_a_run_is_finished_only_with_results_of_its_last_config(whole_run, tmp_path):
    _, workdir, results, _ = whole_run
    shutil.copytree(workdir, tmp_path / "copy")
    saved = json.loads((workdir / "config.json").read_text())
    run = {"data_info": saved.pop("data_info"), "config": saved}

    def found(total=STEPS, **fields):
        changed = run | {"config": {**saved, **fields}}
        return ending.results_of_finished(changed, str(tmp_path / "copy"), total)

    assert found() == found(log_every_steps=7) == results
    assert found(total=STEPS + 1) is None and found(eval=saved["eval"] | {"knn_k": 3}) is None
    os.utime(tmp_path / "copy" / "config.json")  # a later process was killed while it measured
    assert found() is None


def test_results(whole_run):
    config, workdir, returned, _ = whole_run
    results = json.loads((workdir / "results.json").read_text())
    assert results == returned
    assert all(isinstance(value, int | float | str) for value in results.values())
    probes = ("knn_top1", "knn_mean_per_class", "linear_probe_top1", "linear_probe_top1_held_out")
    probes += ("linear_probe_mean_per_class", "fewshot_top1")
    for prefix in ("", "random_init_"):
        for name in probes:
            assert 0 <= results[prefix + name] <= 1, prefix + name
        assert results[f"{prefix}knn_k"] == config.eval.knn_k == 5
        assert results[f"{prefix}knn_temperature"] == config.eval.knn_temperature
        assert results[f"{prefix}linear_probe_C"] in config.eval.linear.C
    # Brightness tells the class, so that even this encoder is far above a third.
    assert results["linear_probe_top1"] > 0.6
    assert not [name for name in results if "top5" in name]  # of three classes it says nothing
    assert results["steps"] == STEPS and results["seed"] == config.seed
    assert results["images_per_second"] > 0
    assert results["device_count"] == 8 and results["device_kind"] == "cpu"
    assert results["undecodable_images"] == 0
    assert isinstance(results["collapsed"], bool)
    assert ("collapsed_at_step" in results) == results["collapsed"]
    last = recorded(workdir)[-1]
    assert last["step"] == STEPS
    for name in ("projection_std", "effective_rank", "loss"):
        assert results[name] == last[name], name


def test_what_a_run_leaves_behind(whole_run):
    config, workdir, _, _ = whole_run
    written = json.loads((workdir / "config.json").read_text())
    assert written["batch_size"] == 16 and written["method"] == "byol"
    assert written["encoder"]["depth"] == config.encoder.depth
    # Resolved: the splits that the run chose by itself stand in it.
    assert written["data"]["train_split"] == "train[:90%]"
    assert written["data"]["test_split"] == "train[90%:]"
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [2, 4, 6]
    assert list(workdir.glob("events.*"))
    assert not list(workdir.rglob("*.partial"))
    assert "conv/kernel" in (workdir / "parameters.txt").read_text()
    assert not (workdir / "plots").exists()  # they are off in this run

    lines = recorded(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    always = {"step", "loss", "probe_loss", "probe_top1", "tau", "learning_rate", "update_norm"}
    always |= {f"grad_norm/{part}" for part in parts(tiny_networks())}
    looks = {"projection_std", "effective_rank", "prediction_target_cosine", "alignment"}
    looks |= {"uniformity", "target_distance"}
    for line in lines:
        assert set(line) == (always if line["step"] % 2 else always | looks)
        assert all(np.isfinite(value) for value in line.values())
    # The cosine is that of the loss, which the device computed.
    for line in lines[1::2]:
        np.testing.assert_allclose(4 - 4 * line["prediction_target_cosine"], line["loss"], 1e-4)
        # And the distance is that of the networks that were saved after the step.
        state = restore(config, workdir, line["step"])
        online, target = (flatten(x) for x in (state.online_params, state.target_params))
        apart, size = (
            np.sqrt(sum(np.sum((online[k] - other * target[k]) ** 2) for k in target))
            for other in (1, 0)
        )
        np.testing.assert_allclose(line["target_distance"], apart / size, 1e-5)


def test_a_checkpoint_says_what_it_belongs_to(whole_run):
    workdir = whole_run[1]
    checkpoints = checkpoint.Checkpoints(str(workdir))
    meta = checkpoints.meta()
    checkpoints.close()
    assert meta["step"] == STEPS
    written = json.loads((workdir / "config.json").read_text())
    assert written == meta["config"] | {"data_info": meta["data_info"]}
    assert meta["data_info"] == {"train_images": 54, "classes": 3}
    # Three batches in an epoch: the next one is the first of the third epoch.
    assert meta["data_position"] == {"epoch": 2, "batch": 0, "steps_per_epoch": 3}
    assert meta["versions"]["jax"] == jax.__version__


def test_probes_leave_the_encoder_alone(whole_run):
    """What the probes were given is the last checkpoint's encoder, and stays so, bit by bit."""
    config, workdir, _, (before, after) = whole_run
    assert_same(after, before)
    state = restore(config, workdir)
    assert_same(before["params"], state.online_params["encoder"])
    assert_same(before["batch_stats"], state.online_stats["encoder"])


def save(checkpoints, state, step=None):
    """Takes the state and waits until it is written."""
    state = state if step is None else state.replace(step=np.int32(step))
    checkpoints.take(parallel.replicate(lambda s: s, state), {"config": {}})
    checkpoints.write()
    checkpoints.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(2, 0, [4, 5]), (1, 2, [2, 4, 5]), (2, 3, [3, 4, 5]), (9, 2, [1, 2, 3, 4, 5])],
)
def test_old_checkpoints_make_room(initial_state, tmp_path, keep, keep_every, left):
    checkpoints = checkpoint.Checkpoints(str(tmp_path), keep, keep_every)
    for step in range(1, 6):
        save(checkpoints, initial_state, step)
    assert checkpoints.latest_step == 5
    assert [checkpoints.keeps(step) for step in (2, 3, 4)] == [
        bool(keep_every) and step % keep_every == 0 for step in (2, 3, 4)
    ]
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == left


def test_checkpoint_restores_every_field(initial_state, tmp_path):
    """Each leaf has a value of its own here: none can come back as another."""
    numbers = iter(range(1000))
    opt_state = (np.zeros(3, np.float32), {"b": np.zeros(2, np.int32), "a": np.zeros((), np.int32)})
    marked = jax.tree.map(
        lambda x: np.full_like(x, next(numbers)), initial_state.replace(opt_state=opt_state)
    )
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    save(checkpoints, marked)
    restored = checkpoints.restore(jax.eval_shape(lambda: marked))
    checkpoints.close()
    assert_same(restored, marked)


def test_a_checkpoint_is_of_the_state_when_it_was_taken(initial_state, tmp_path):
    """The next step may overwrite the state before the writing has begun."""
    state = parallel.replicate(lambda s: s, initial_state.replace(step=np.int32(7)))
    bump = parallel.step_over_devices(
        lambda s, _, axis_name: s.replace(
            step=s.step + 1, online_params=jax.tree.map(lambda x: x + 1, s.online_params)
        )
    )
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.take(state, {"config": {"a": [1, None]}})
    state = bump(state, np.zeros(8))
    checkpoints.write()
    state = bump(state, np.zeros(8))
    checkpoints.write()  # nothing was taken since
    checkpoints.wait()
    assert checkpoints.latest_step == 7 and not checkpoints.busy
    assert_same(checkpoints.restore(initial_state).online_params, initial_state.online_params)
    meta = checkpoints.meta()
    assert meta["config"] == {"a": [1, None]} and meta["step"] == 7
    checkpoints.close()


def test_a_state_that_is_not_finite_is_not_saved(initial_state, tmp_path):
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    save(checkpoints, initial_state, 1)
    params = jax.tree.map(np.copy, initial_state.online_params)
    params["projector"]["output"]["kernel"][0, 0] = np.inf
    with pytest.raises(UserError, match=r"step 2 are not finite.*last checkpoint is of step 1"):
        save(checkpoints, initial_state.replace(online_params=params), 2)
    checkpoints.write()
    assert checkpoints.latest_step == 1
    checkpoints.close()


def damage_files(folder, how):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        if how == "deleted":
            path.unlink()
        elif how == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif how == "emptied":
            os.truncate(path, 0)
    if how == "largest cut":
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 10)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "cut", "emptied", "largest cut"])
@pytest.mark.parametrize("item", ["state", "meta"])
def test_a_broken_checkpoint_is_named_and_the_next_older_one_taken(
    initial_state, tmp_path, item, how, capsys
):
    checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=3)
    for step in (1, 2, 3):
        save(checkpoints, initial_state, step)
    checkpoints.close()
    newest = tmp_path / "checkpoints" / "3"
    damage_files(newest / item, how)
    capsys.readouterr()

    checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the checkpoint {newest} cannot be read: ")
    assert line.endswith("; going on from step 2")
    assert checkpoints.latest_step == checkpoints.committed_step() == 2
    assert checkpoints.meta()["step"] == 2
    assert_same(checkpoints.restore(initial_state), initial_state.replace(step=np.int32(2)))
    assert newest.exists()  # until the run saves again

    save(checkpoints, initial_state, 3)
    assert checkpoints.latest_step == 3
    assert_same(checkpoints.restore(initial_state), initial_state.replace(step=np.int32(3)))
    checkpoints.close()
    assert (tmp_path / "damaged_checkpoints" / "3").exists()


PICTURES = ("learning_curves", "nearest_neighbours", "representation_map", "view_pairs")


@pytest.mark.slow
def test_a_watched_run(whole_run, folders, tmp_path, capfd, monkeypatch):
    """kNN and pictures on the way change nothing; what looks like a collapse is told once."""
    changes = {"monitor.knn_every_steps": 3, "monitor.plots_every_steps": 3}
    changes |= {"monitor.collapse_std": 1e9, "monitor.map_images": 4}  # anything looks like one
    config = tiny_config(folders["labels"], **changes)
    shown = {}
    view_pairs = plots.view_pairs

    def spy(path, first, second, local, *, step):
        shown[step] = np.stack([first, second])
        view_pairs(path, first, second, local, step=step)

    monkeypatch.setattr(plots, "view_pairs", spy)
    results = pretrain.pretrain(config, str(tmp_path), build)
    assert capfd.readouterr().err.count("WARNING: the run has collapsed by step 4") == 1
    assert results["collapsed"] is True and results["collapsed_at_step"] == 4
    assert_same(restore(config, tmp_path), restore(config, whole_run[1]))

    lines = recorded(tmp_path)
    assert [line["step"] for line in lines if "knn_top1" in line] == [3, 6]
    # The last look is at the encoder that the probes have, with the same neighbours.
    assert lines[-1]["knn_top1"] == results["knn_top1"] == whole_run[2]["knn_top1"]
    unwatched = recorded(whole_run[1])
    assert [{k: v for k, v in line.items() if k != "knn_top1"} for line in lines] == unwatched
    pictures = {path.stem: path for path in (tmp_path / "plots").iterdir()}
    assert sorted(pictures) == sorted(PICTURES)
    for path in pictures.values():
        with Image.open(path) as picture:
            assert min(picture.size) > 100

    # The pairs are what the step before the picture saw, from the seed and its number alone.
    built = build(config, 3, STEPS, 2)
    rng = built.init_state(jax.random.PRNGKey(config.seed)).rng
    data = inputs.load_data(config.copy_and_resolve_references())
    feed = inputs.feed(config, data.train)
    crop = jax.jit(feed.views)
    assert sorted(shown) == [3, 6]
    for step, views in shown.items():
        batch = next(inputs.train_batches(config, data, step - 1))
        del batch["name"]
        batch = crop(feed.arrays, np.int32(step - 1), batch)
        key = jax.random.fold_in(rng, step - 1)
        expected = augment_views(key, batch, built.augment.groups)["global"]
        assert views.shape == (2, config.monitor.view_pairs, 8, 8, 3)
        np.testing.assert_allclose(views, expected[:, : views.shape[1]], atol=1e-6)

    again = pretrain.pretrain(config, str(tmp_path), build)
    assert again == results
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_without_labels(folders, tmp_path):
    changes = {"steps": 2, "monitor.knn_every_steps": 1, "monitor.plots_every_steps": 2}
    config = tiny_config(folders["no labels"], **changes)
    results = pretrain.pretrain(config, str(tmp_path), build)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["steps"] == 2 and results["images_per_second"] > 0
    assert not [name for name in results if "top1" in name or "top5" in name]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["data"]["train_split"] == "train"  # all of it: nothing is held out
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == sorted(PICTURES)
    assert not [name for line in recorded(tmp_path) for name in line if "top1" in name]


def files_of_step(config, step):
    """What the pipeline's order gives to a step: the paths of its batch, in their places."""
    source = sources.load("folder", config.data.dir, "train[:90%]", "data.train_split")
    epoch, place = divmod(step - 1, source.num_examples // config.batch_size)
    order = epoch_order(source.num_examples, config.seed, epoch)
    rows = order[place * config.batch_size :][: config.batch_size]
    return [str(source.images[i]) for i in rows]


RATE = {"optimizer.learning_rate": 1e12, "optimizer.schedule": "constant"}
RATE |= {"optimizer.name": "sgd", "optimizer.weight_decay": 1e12}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken_build", "changes", "step", "broken", "whole"),
    [
        # The warm-up's first step has rate 0, the second one of 3e36: its square is infinite.
        (build, RATE, 2, {"update_norm"}, {"loss", "grad_norm/encoder"}),
        # Never logged, and looked at only when step 6 is to be saved.
        (
            breaking_build("loss", 5),
            {"log_every_steps": 100, "monitor.diagnostics_every_steps": 0, "steps": 9},
            5,
            {"loss", "grad_norm/encoder", "grad_norm/projector", "update_norm"},
            {"learning_rate", "tau", "probe_loss"},
        ),
        (
            breaking_build("gradient", 5),
            {},
            5,
            {"grad_norm/encoder", "update_norm"},
            {"loss", "probe_loss", "grad_norm/projector", "grad_norm/predictor"},
        ),
    ],
    ids=["rate", "loss", "gradient"],
)
def test_a_diverging_run_stops(
    folders, tmp_path, monkeypatch, broken_build, changes, step, broken, whole
):
    """At the very step, which is named with its images; what was saved before it stays."""
    config = tiny_config(folders["labels"], **changes)
    taken = {}
    take = checkpoint.Checkpoints.take

    def spy(self, state, meta):
        taken[int(parallel.unreplicate(state).step)] = parallel.unreplicate(state)
        take(self, state, meta)

    monkeypatch.setattr(checkpoint.Checkpoints, "take", spy)
    with pytest.raises(UserError) as error:
        pretrain.pretrain(config, str(tmp_path), broken_build)
    message = str(error.value)
    assert message.startswith(f"step {step} is not finite: ") and "\n" not in message
    assert str(tmp_path / "non_finite.json") in message
    assert "config.optimizer.learning_rate" in message
    assert not (tmp_path / "results.json").exists()

    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["step"] == step
    assert broken <= set(found["non_finite"]) and not whole & set(found["non_finite"])
    assert all(f"{name} " in message.partition(";")[0] for name in found["non_finite"])
    assert not any(f"{name} " in message.partition(";")[0] for name in whole)
    for name, value in found["metrics"].items():
        assert np.isfinite(float(value)) == (name not in found["non_finite"]), name
    assert found["images"] == files_of_step(config, step)
    assert found["images"] != files_of_step(config, step - 1)
    lines = recorded(tmp_path)
    assert [line["step"] for line in lines] == [
        k for k in range(1, step) if "log_every_steps" not in changes
    ]

    saved = [k for k in (2, 4) if k < step]
    assert list(taken) == saved
    checkpoints = checkpoint.Checkpoints(str(tmp_path), 9)
    assert checkpoints.latest_step == (saved[-1] if saved else None)
    for k in saved:
        assert_same(checkpoints.restore(taken[k], k), taken[k])
    checkpoints.close()


def test_a_step_that_is_not_finite_is_found_two_steps_later(folders, tmp_path, interrupt):
    """Even where nothing is logged or saved for long; and the step itself is named."""
    config = counting_config(
        folders["labels"], log_every_steps=100, checkpoint_every_steps=100, steps=50
    )
    begun = []
    for step in range(1, 51):
        interrupt[step] = functools.partial(begun.append, step)
    with pytest.raises(UserError, match=r"^step 31 is not finite: loss inf;"):
        pretrain.pretrain(config, str(tmp_path), functools.partial(counting_build, infinite_at=31))
    assert begun[-1] == 33
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["step"] == 31 and found["metrics"] == {"finite": 0.0, "loss": "inf"}
    assert found["images"] == files_of_step(config, 31)


# ------------------------------------------------------------------------------- the loop


def test_a_checkpoint_waits_while_another_is_being_written(folders, tmp_path, monkeypatch):
    """Rather than hold a step up; those that are kept for good, and the last one, do not."""
    config = counting_config(folders["labels"], keep_every_steps=5, steps=8)
    answers = iter([True, True, False])  # asked at 2, where one is due, and at 3 and 4 again
    busy = property(lambda self: next(answers, True))
    monkeypatch.setattr(checkpoint.Checkpoints, "busy", busy)
    pretrain.pretrain(config, str(tmp_path), counting_build)
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {4, 5, 8}


@pytest.mark.slow
def test_a_run_becomes_longer(folders, tmp_path):
    """Where no schedule depends on its length; a finished run that is longer already stays."""
    constant = {"optimizer.schedule": "constant", "tau_schedule": "constant"}
    for steps, done in ((3, 3), (6, 6), (4, 6)):
        config = counting_config(folders["labels"], steps=steps, **constant)
        assert pretrain.pretrain(config, str(tmp_path), counting_build)["steps"] == done
        assert [line["step"] for line in recorded(tmp_path)] == list(range(1, done + 1))
        assert json.loads((tmp_path / "config.json").read_text())["steps"] == steps
    with pytest.raises(UserError, match=r"config.tau_schedule='cosine'"):
        pretrain.pretrain(
            counting_config(folders["labels"], **constant | {"tau_schedule": "cosine"}),
            str(tmp_path),
            counting_build,
        )


def test_without_a_checkpoint_there_is_no_run_to_keep_to(folders, tmp_path):
    """A mistake that is found after the config was written must not lock the workdir."""

    def mistaken(*args):
        def init_state(rng):
            raise Killed

        return dataclasses.replace(counting_build(*args), init_state=init_state)

    unchecked = {"optimizer.exclude": ()}  # else the first state is looked at before any data
    with pytest.raises(Killed):
        pretrain.pretrain(counting_config(folders["labels"], **unchecked), str(tmp_path), mistaken)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["batch_size"] == 16
    config = counting_config(folders["labels"], batch_size=8, seed=3)
    pretrain.pretrain(config, str(tmp_path), counting_build)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 8


@pytest.mark.slow
def test_some_steps_are_profiled(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)  # clu's profiler comes with Keras
    profile = {"profile.first_step": 3, "profile.num_steps": 2}
    config = counting_config(folders["labels"], **profile)
    pretrain.pretrain(config, str(tmp_path), counting_build)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    for changes in ({"steps": 4}, {"profile.first_step": 6}):
        config = counting_config(folders["labels"], **profile | changes)
        with pytest.raises(UserError, match=r"config.profile.first_step=.*run's"):
            pretrain.pretrain(config, str(tmp_path / "another"), counting_build)
    assert not (tmp_path / "another").exists()


@pytest.mark.slow
def test_what_is_kept_for_good_is_not_given_up(folders, tmp_path):
    """Another multiple, or none, would delete the checkpoints that were to stay."""
    kept = {"keep_checkpoints": 1, "keep_every_steps": 2, "eval.enabled": False}
    pretrain.pretrain(tiny_config(folders["labels"], **kept), str(tmp_path), build)
    with pytest.raises(UserError, match=r"config\.keep_every_steps=0: .* has 2"):
        changed = kept | {"keep_every_steps": 0}
        pretrain.pretrain(tiny_config(folders["labels"], **changed), str(tmp_path), build)
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {2, 4, 6}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "host"])
def test_broken_images_are_counted_over_the_whole_run(tmp_path, placement):
    """A run that goes on knows of those that it found before it was stopped."""
    images = write_images(tmp_path / "images", 3, 60)
    (images / "class_0" / "0.png").write_bytes(b"no picture")
    settings = {"data.max_undecodable": 0.5, "eval.enabled": False, "data.placement": placement}
    config = tiny_config(images, **settings)
    whole = pretrain.pretrain(config, str(tmp_path / "whole"), build)
    assert whole["undecodable_images"] == 1
    again = pretrain.pretrain(tiny_config(images, **settings), str(tmp_path / "whole"), build)
    assert again["undecodable_images"] == 1  # though nothing was read this time


@pytest.mark.slow
def test_no_picture_is_worth_a_run(folders, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no such font")

    monkeypatch.setattr(plots, "learning_curves", fail)
    config = tiny_config(folders["labels"], **{"monitor.plots_every_steps": 3})
    results = pretrain.pretrain(config, str(tmp_path), build)
    assert results["steps"] == STEPS


def test_an_unknown_reference_is_named(folders, tmp_path):
    config = counting_config(folders["labels"], **{"monitor.reference": "no such"})
    with pytest.raises(UserError, match=r"config.monitor.reference='no such'"):
        pretrain.pretrain(config, str(tmp_path), counting_build)


def test_another_runs_workdir_is_refused(whole_run):
    config, workdir, _, _ = whole_run
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"config.tau_base=0.5.*0.99"):
        pretrain.pretrain(tiny_config(config.data.dir, tau_base=0.5), str(workdir), build)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
