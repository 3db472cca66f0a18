"""Pretraining that starts from the weights of a run, an export or an import."""

from __future__ import annotations

import importlib
import json
import shutil

import foreign
import jax
import numpy as np
import optax
import pytest
import tiny_jobs
import tiny_runs
from conftest import flatten

from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.interop import exporting, importing
from selfsup_jax.models import resnet
from selfsup_jax.state import encoder_variables
from selfsup_jax.training import init_from
from selfsup_jax.viz.report import page

BASIC = ((1, 0, 0, 1), False)
FEATURES = 16
SIZE = {"byol": 16, "moco": 8, "simclr": 8}  # BYOL's stem has a stride of 4
HEADS = {
    "byol": {"projector": (8,), "predictor": (8,)},
    "moco": {"projector": (FEATURES,)},
    "simclr": {"projector": (FEATURES,)},
}


def make_config(method, **changes):
    """A recipe of the authors with a network of two blocks, for small images."""
    config = importlib.import_module(f"configs.{method}").get_config("folder")
    for view in (config.views["global"].view_1, config.views["global"].get("view_2")):
        if view is not None:
            view.update(
                flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0
            )
    own = importlib.import_module(f"configs.{method}").get_config("imagenet").encoder
    config.encoder.update(own)
    config.encoder.update(depth=2, width=2 / 64, stem="cifar" if method != "byol" else "imagenet")
    config.update(batch_size=8, bn_groups=1, compute_dtype="float32")
    config.data.update(image_size=SIZE[method], test_resize=SIZE[method])
    for head, sizes in HEADS[method].items():
        config[head].update(hidden_sizes=sizes, output_size=4)
    if method == "moco":
        config.queue_size = 16
    if method == "simclr":
        config.views.update(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def build(config, classes=5):
    return importlib.import_module(f"{config.method}_jax.method").build(config, classes, 10, 1)


def write_source(method, folder):
    """An import of a small checkpoint in the authors' format; and its parts by our names."""
    options = {"stem": 7 if method == "byol" else 3, "project_first": method != "moco"}
    first, second = (foreign.make_resnet(*BASIC, **options, seed=seed) for seed in (0, 1))
    path = folder / "source"
    if method == "moco":
        path.write_bytes(foreign.torch_bytes(foreign.moco_file(first, second, features=FEATURES)))
    elif method == "byol":
        networks = [foreign.haiku_network(x, FEATURES, i) for i, x in enumerate((first, second))]
        path.write_bytes(foreign.byol_bytes(*networks))
    else:
        tf = pytest.importorskip("tensorflow")
        variables = foreign.simclr_variables(first, FEATURES)
        options = {"tensor_names": list(variables), "tensors": list(variables.values())}
        tf.raw_ops.SaveV2(prefix=str(path), shape_and_slices=[""] * len(variables), **options)
    frozen, weights = importing.read(str(path))
    importing.save(frozen, weights, str(folder / "imported"))
    return str(folder / "imported"), weights.arrays


@pytest.fixture(autouse=True)
def small_resnets(monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 2, BASIC)


def arrays_of(state) -> dict[str, np.ndarray]:
    fields = ("online_params", "online_stats", "target_params", "target_stats")
    return flatten({name: getattr(state, name) for name in fields})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["byol", "moco", "simclr"])
def test_the_authors_checkpoints_are_trained_on(tmp_path, method):
    """Imported with heads, target and queue; trained for three steps; exported; imported."""
    path, theirs = write_source(method, tmp_path)
    config = make_config(method)
    made = build(config)
    initial = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    source = init_from.load(path, config)
    state, told = init_from.begin(initial, source)
    ours = arrays_of(state)
    # The momentum is part by part that of the source, where its authors' optimizer is ours too.
    names = [name for name in theirs if "_momentum_params/" in name]
    momentum = {name.split("/", 1)[1]: theirs.pop(name) for name in names}
    trace = flatten(optax.tree_utils.tree_get(state.opt_state, "trace"))
    for name, array in trace.items():
        np.testing.assert_array_equal(array, momentum.get(name, 0 * array))
    assert bool(momentum) == (method != "simclr") and len(momentum) <= len(trace)
    moving = {"byol": "momentum", "moco": "momentum of encoder and projector", "simclr": "queue"}
    assert told.taken.endswith(moving[method]) == (method != "simclr")
    assert not init_from.normalization_note(source, config.views)
    if method == "moco":  # its file has no classifier of labels
        assert told.new == "classifier (not in the source)"
        np.testing.assert_array_equal(state.queue, theirs["queue"])
        assert state.queue_index == 8
        ours = {name: x for name, x in ours.items() if "/classifier/" not in name}
        theirs = {name: x for name, x in theirs.items() if not name.startswith("queue")}
    else:
        assert told.new == ("optimizer" if method == "simclr" else "")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)

    step = jax.jit(made.train_step)
    rng, size = np.random.default_rng(0), SIZE[method]
    views = {f"view_{i}": rng.integers(0, 256, (8, size, size, 3)).astype(np.uint8) for i in (1, 2)}
    batch = views | {
        "index": np.arange(8, dtype=np.int32),
        "label": np.arange(8, dtype=np.int32) % 5,
    }
    for _ in range(3):
        state, metrics = step(state, batch)
    assert state.step == 3 and metrics["finite"] == 1
    variables = jax.device_get(encoder_variables(state))
    before = source.arrays["online_params/encoder/stem/kernel"]
    moved = np.abs(variables["params"]["stem"]["kernel"] - before).max()
    assert 0 < moved < 0.5 * np.abs(before).max()

    frozen = encoder.load(path)._replace(variables=variables, step=3)
    to = "torchvision" if method == "moco" else "safetensors"
    fields = frozen.config["encoder"] | {"width": 1.0}
    exporting.check({"encoder": fields}, to, measured=False)
    exporting.export(frozen, str(tmp_path / "out"), to, {})
    again, _ = importing.read(str(tmp_path / "out"))
    for name, array in flatten(variables).items():
        np.testing.assert_array_equal(flatten(again.variables)[name], array)


def test_what_does_not_fit_is_new_and_told(tmp_path):
    """A head is taken whole or not at all; the target follows the online network."""
    path, theirs = write_source("moco", tmp_path)
    config = make_config("moco", projector__output_size=6, queue_size=32)
    shapes = jax.eval_shape(build(config).init_state, jax.random.PRNGKey(0))
    initial = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), shapes)
    state, told = init_from.begin(initial, init_from.load(path, config))
    assert told.taken == "encoder, target encoder, momentum of encoder"
    assert "projector (output/bias is [4] in the source, [6] here)" in told.new
    assert told.new.endswith(", queue") and told.left_out == "projector"
    for name, array in arrays_of(state).items():
        new = "/projector/" in name or "/classifier/" in name
        np.testing.assert_array_equal(array, np.full_like(array, 7) if new else theirs[name])
    assert (np.asarray(state.queue) == 7).all()
    # Of another method, whose file has no target network.
    config = make_config("byol", encoder=config.encoder)
    shapes = jax.eval_shape(build(config).init_state, jax.random.PRNGKey(0))
    initial = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), shapes)
    source = init_from.load(path, config)
    online_only = {k: v for k, v in source.arrays.items() if not k.startswith("target_")}
    state, told = init_from.begin(initial, source._replace(arrays=online_only))
    assert told.taken == "encoder, target encoder (a copy of the online one)"
    stem = theirs["online_params/encoder/stem/kernel"]
    np.testing.assert_array_equal(state.target_params["encoder"]["stem"]["kernel"], stem)


def test_an_encoder_that_computes_something_else_is_refused(tmp_path):
    """The shapes would fit: another padding is named, with the flags that help."""
    path, _ = write_source("moco", tmp_path)
    for changes, flags in (
        ({"encoder__padding": "same"}, "--config.encoder.padding=torch"),
        (
            {"encoder__depth": 18, "encoder__stem": "imagenet"},
            "--config.encoder.depth=2 --config.encoder.stem=cifar",
        ),
    ):
        with pytest.raises(UserError, match=r"config\.init_from=") as e:
            init_from.load(path, make_config("moco", **changes))
        assert flags in str(e.value)
    config = make_config("moco", views__mean=(0.5, 0.5, 0.5))
    note = init_from.normalization_note(init_from.load(path, config), config.views)
    assert "--config.views.mean='(0.485, 0.456, 0.406)'" in note
    for name in ("missing", "source"):
        with pytest.raises(UserError, match=r"config\.init_from=") as e:
            init_from.load(str(tmp_path / name), config)
        assert ("selfsup_jax.interop import" in str(e.value)) == (name == "source")
    with open(tmp_path / "imported" / "training.npz", "r+b") as f:
        f.truncate(100)
    with pytest.raises(UserError, match=r"config\.init_from=.*training.npz"):
        init_from.load(path, config)


@pytest.mark.slow
def test_a_run_from_a_run(tmp_path, monkeypatch):
    """Its encoder, told in `config.json`; a resume needs the source no more."""
    with tiny_jobs.small_encoder():
        data = tiny_jobs.write_data(tmp_path / "data")
        first = tiny_jobs.make_run(data, tmp_path / "first")
        source = tmp_path / "source"
        encoder.export(encoder.load(str(first), 2), str(source))
        second = tiny_jobs.make_run(data, tmp_path / "second", init_from=str(source), seed=1)
        own, fresh = (
            flatten(encoder.load(str(run), 1).variables["params"]) for run in (second, first)
        )
        taken = flatten(encoder.load(str(source)).variables["params"])
        for name, array in taken.items():  # one step of noise of 0.05 later
            assert np.abs(own[name] - array).max() < 0.3
        kernels = [name for name in own if name.endswith("kernel")]
        assert max(np.abs(own[name] - fresh[name]).max() for name in kernels) > 0.1
        told = json.loads((second / "config.json").read_text())
        assert told["init_from"] == str(source)
        started = told["data_info"]["init_from"]
        assert started["origin"] == "run first, step 2"
        assert started["taken"] == "encoder, target encoder (a copy of the online one)"
        results = json.loads((second / "results.json").read_text())
        assert results["init_from"] == "run first, step 2"
        page.write([str(second)], str(tmp_path / "report.html"), None)
        assert "started from run first, step 2" in (tmp_path / "report.html").read_text()
        # As if the last step had not been done.
        before = encoder.load(str(second), 4).variables
        shutil.rmtree(source)
        shutil.rmtree(second / "checkpoints" / "4")
        tiny_jobs.make_run(data, second, init_from=str(source), seed=1)
        after = encoder.load(str(second), 4).variables
        for name, array in flatten(before).items():
            np.testing.assert_array_equal(flatten(after)[name], array)
        assert json.loads((second / "config.json").read_text()) == told
        with pytest.raises(UserError, match=r"config\.init_from=''"):
            tiny_jobs.make_run(data, second, seed=1)
    assert tiny_runs.saved_steps(second) == [1, 2, 3, 4]
