"""The loop: stopping and going on, results, what a run leaves behind; and who may import whom."""

from __future__ import annotations

import ast
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, assert_same, flatten, tiny_networks, tiny_step
from PIL import Image

from byol_jax import method
from configs import byol
from selfsup_jax import checkpoint, optim, parallel, train
from selfsup_jax.augment import ViewAugmentation
from selfsup_jax.errors import UserError
from selfsup_jax.state import Method

STEPS = 6


# -------------------------------------------------------------------------------- tiny runs


def build(config, num_classes, total_steps, warmup_steps):
    """`byol_jax.method.build` with an encoder that compiles in a second."""
    networks = tiny_networks(num_classes)
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps
    )
    step, _ = tiny_step(
        networks,
        optimizer=optimizer,
        schedule=schedule,
        tau=lambda step: optim.cosine_tau(step, total_steps, config.tau_base),
        augment=tuple(ViewAugmentation(**config.augment[view]) for view in ("view_1", "view_2")),
        bn_groups=config.bn_groups,
    )

    def init_state(rng):
        size = config.data.image_size
        return method.init_state(
            rng, networks_=networks, optimizer=optimizer, image_shape=(size, size, 3)
        )

    return Method(init_state, step, lambda v, x: networks.encoder.apply(v, x))


def write_images(folder, classes, rows):
    """Small images of a colour of their own, whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for i in range(rows):
        label = i % max(1, classes)
        parent = folder / f"class_{label}" if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (10, 10, 3)) + rng.integers(0, 30, 3) + 80 * label
        Image.fromarray(pixels.astype(np.uint8)).save(parent / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return {
        "labels": write_images(root / "labels", 3, 60),
        "no labels": write_images(root / "no_labels", 0, 40),
    }


def tiny_config(folder, **changes):
    config = byol.get_config("folder")
    config.data.dir = str(folder)
    config.data.image_size = 8
    config.data.test_resize = 8
    config.batch_size = 16
    config.steps = STEPS
    config.optimizer.warmup_steps = 2
    config.log_every_steps = 1
    config.checkpoint_every_steps = 2
    config.keep_checkpoints = 9
    config.eval.knn_k = 5
    config.eval.fewshot_labels = 2
    config.eval.fewshot_draws = 2
    for view in (config.augment.view_1, config.augment.view_2):  # cheap to compile, still random
        view.update(jitter_prob=0.0, blur_prob=0.0)
    config.update_from_flattened_dict(changes)
    return config


def restore(config, workdir, step=None):
    """(every leaf of the checkpoint by its name, the steps that have checkpoints)."""
    like = build(config, 3, STEPS, 2).init_state(jax.random.PRNGKey(config.seed))
    checkpoints = checkpoint.Checkpoints(str(workdir), config.keep_checkpoints)
    state = checkpoints.restore(like, step)
    checkpoints.close()
    return state


class Stopped(Exception):
    """In place of whatever ends a process."""


@pytest.fixture(scope="module")
def whole_run(folders, tmp_path_factory):
    """An uninterrupted run: config, workdir, results, and the encoder as the probes got it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    config = tiny_config(folders["labels"])
    probed = []
    evaluate = train.final.evaluate

    def spy(represent, trained, *args, **kwargs):
        before = jax.tree.map(np.copy, trained)
        results = evaluate(represent, trained, *args, **kwargs)
        probed.append((before, jax.tree.map(np.asarray, trained)))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.final, "evaluate", spy)
        results = train.pretrain(config, str(workdir), build)
    return config, workdir, results, probed[0]


def test_stopping_and_going_on_changes_nothing(whole_run, folders, tmp_path, monkeypatch):
    """Stopped in the second epoch and continued: every bit of the last state is the same."""
    config, workdir, results, _ = whole_run
    save = checkpoint.Checkpoints.save
    first_states = []

    def save_and_stop(self, state):
        save(self, state)
        first_states.append(int(parallel.unreplicate(state).step))
        if first_states[-1] == 4:
            raise Stopped

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_stop)
    with pytest.raises(Stopped):
        train.pretrain(tiny_config(folders["labels"]), str(tmp_path), build)
    assert first_states == [2, 4]
    assert not (tmp_path / "results.json").exists()
    resumed = train.pretrain(tiny_config(folders["labels"]), str(tmp_path), build)
    assert first_states == [2, 4, 6]  # steps 5 and 6 only, none of them twice

    for step in (4, 6):
        assert_same(restore(config, tmp_path, step), restore(config, workdir, step))
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


def test_a_finished_run_only_evaluates_again(whole_run, tmp_path, monkeypatch):
    config, workdir, results, _ = whole_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    monkeypatch.setattr(parallel, "pmap_step", None)  # nothing is left to train
    assert train.pretrain(tiny_config(config.data.dir), str(copy), build) == results
    assert_same(restore(config, copy), restore(config, workdir))


def test_results(whole_run):
    config, workdir, returned, _ = whole_run
    results = json.loads((workdir / "results.json").read_text())
    assert results == returned
    assert all(isinstance(value, int | float | str) for value in results.values())
    probes = ("knn_top1", "linear_probe_top1", "linear_probe_top5", "fewshot_top1")
    for name in (*probes, *(f"random_init_{probe}" for probe in probes)):
        assert 0 <= results[name] <= 1, name
    # Brightness tells the class, so that even this encoder is far above a third.
    assert results["linear_probe_top1"] > 0.6
    assert results["linear_probe_top5"] == 1.0
    assert results["steps"] == STEPS and results["seed"] == config.seed
    assert results["images_per_second"] > 0
    assert results["device_count"] == 8 and results["device_kind"] == "cpu"
    assert results["undecodable_images"] == 0


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


def test_probes_leave_the_encoder_alone(whole_run):
    """What the probes were given is the last checkpoint's encoder, and stays so, bit by bit."""
    config, workdir, _, (before, after) = whole_run
    assert_same(after, before)
    state = restore(config, workdir)
    assert_same(before["params"], state.online_params["encoder"])
    assert_same(before["batch_stats"], state.online_stats["encoder"])


def test_old_checkpoints_make_room(initial_state, tmp_path):
    checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=2)
    for step in (1, 2, 3):
        state = initial_state.replace(step=np.int32(step))
        checkpoints.save(parallel.replicate(lambda s: s, state))
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_checkpoint_restores_every_field(initial_state, tmp_path):
    """Each leaf has a value of its own here: none can come back as another."""
    numbers = iter(range(1000))
    opt_state = (np.zeros(3, np.float32), {"b": np.zeros(2, np.int32), "a": np.zeros((), np.int32)})
    marked = jax.tree.map(
        lambda x: np.full_like(x, next(numbers)), initial_state.replace(opt_state=opt_state)
    )
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save(parallel.replicate(lambda s: s, marked))
    restored = checkpoints.restore(jax.eval_shape(lambda: marked))
    checkpoints.close()
    assert_same(restored, marked)


def test_a_run_without_labels(folders, tmp_path):
    results = train.pretrain(tiny_config(folders["no labels"], steps=2), str(tmp_path), build)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["steps"] == 2 and results["images_per_second"] > 0
    assert not [name for name in results if "top1" in name or "top5" in name]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["data"]["train_split"] == "train"  # all of it: nothing is held out


def test_a_diverging_run_stops(folders, tmp_path):
    config = tiny_config(
        folders["labels"], **{"optimizer.learning_rate": 1e38, "optimizer.schedule": "constant"}
    )
    with pytest.raises(
        UserError,
        match=r"config\.optimizer\.learning_rate=1e\+38",
    ):
        train.pretrain(config, str(tmp_path), build)
    assert not (tmp_path / "results.json").exists()


def test_another_runs_workdir_is_refused(whole_run):
    config, workdir, _, _ = whole_run
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"config.tau_base=0.5.*0.99"):
        train.pretrain(tiny_config(config.data.dir, tau_base=0.5), str(workdir), build)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


# ------------------------------------------------------------------- who may import whom

METHODS = sorted(p.name for p in REPOSITORY.glob("*_jax") if p.is_dir() and p.name != "selfsup_jax")
SOURCES = {
    path.relative_to(REPOSITORY): ast.parse(path.read_text())
    for root in (*METHODS, "selfsup_jax", "configs", "run_experiment.py")
    for path in sorted([REPOSITORY / root] + list((REPOSITORY / root).rglob("*.py")))
    if path.is_file()
}


def imports(tree):
    """Dotted names of all that a file imports, at its top or inside: `from a import b` is `a.b`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def importers(*packages):
    """The files that import one of the packages (or names in them)."""
    return {
        str(path)
        for path, tree in SOURCES.items()
        if any(name == p or name.startswith(p + ".") for name in imports(tree) for p in packages)
    }


def attributes(tree):
    """`{"pmap", ...}`: every name that is looked up in something, or imported from it."""
    looked_up = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return looked_up | {name.rpartition(".")[2] for name in imports(tree)}


def test_methods_import_no_other_method_and_the_house_imports_none():
    assert "byol_jax" in METHODS
    for name in METHODS:
        users = {path.split("/")[0] for path in importers(name)}
        assert users <= {name, "run_experiment.py"}
        assert "run_experiment.py" in users


def test_nothing_imports_the_entry_point():
    assert not importers("run_experiment")


def test_configs_import_only_ml_collections_and_each_other():
    allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
    found = {
        name.split(".")[0]
        for path, tree in SOURCES.items()
        if path.parts[0] == "configs"
        for name in imports(tree)
    }
    assert "ml_collections" in found and found <= allowed


def test_tensorflow_is_only_in_the_data_package():
    users = importers("tensorflow", "tensorflow_datasets")
    assert "selfsup_jax/data/pipeline.py" in users
    assert all(path.startswith("selfsup_jax/data/") for path in users)


def test_only_parallel_knows_devices():
    collectives = {
        *("pmap", "pmean", "psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute"),
        *("pshuffle", "psum_scatter", "axis_index", "axis_size", "shard_map"),
    }
    users = {str(path) for path, tree in SOURCES.items() if attributes(tree) & collectives}
    assert users == {"selfsup_jax/parallel.py"}


def test_the_axis_is_named_in_one_place():
    for path, tree in SOURCES.items():
        if path.name == "parallel.py":
            assert "AXIS_NAME" in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            continue
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert parallel.AXIS_NAME not in strings, path
        assert "AXIS_NAME" not in attributes(tree), path


def test_flags_are_only_in_the_entry_point():
    assert importers("absl.flags", "absl.app", "ml_collections.config_flags") == {
        "run_experiment.py"
    }


def test_the_mathematics_sees_no_config_and_does_no_input_or_output():
    pure = [
        path
        for path in SOURCES
        if path.name in ("losses.py", "networks.py", "augment.py", "queue.py")
        or path.parts[:2] == ("selfsup_jax", "models")
    ]
    assert len(pure) >= 6
    for path in pure:
        packages = {name.split(".")[0] for name in imports(SOURCES[path])}
        assert not packages & {"ml_collections", "configs", "os", "pathlib", "json", "absl"}, path
        calls = {
            node.func.id
            for node in ast.walk(SOURCES[path])
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print"}, path
