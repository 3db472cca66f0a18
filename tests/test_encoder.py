"""An encoder read from a run's checkpoints, carried away and read again."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same, flatten
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.models import resnet
from selfsup_jax.run import checkpoint
from selfsup_jax.state import TrainState

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
# How earlier versions read images.
READING = {"labels": "auto", "intensity": "full", "exif_orientation": False}
ENCODER = {
    **{"depth": 18, "width": 0.004, "stem": "cifar", "stage1_projection": False},
    **{"zero_init_gamma": False, "zero_init_basic": True},
}
READING |= {"crop_on": "host", "canvas": 512}
CONFIG = {
    "method": "byol",
    "seed": 3,
    "compute_dtype": "bfloat16",
    "batch_size": 16,
    "encoder": ENCODER
    | {"remat": "none", "pool_first": "auto", "product_norm_stages": -1}
    | {"name": "resnet", "vit": common.vit().to_dict()},
    "data": {"name": "folder", "image_size": 8} | READING,
    "views": {"mean": MEAN, "std": STD},
}
STEPS = (20, 40, 100)  # as text 100 comes before 20


def variables_of(step: int):
    """An encoder of its own for each step: numbers that nobody else would draw."""
    module = resnet.ResNet(**ENCODER)
    shapes = jax.eval_shape(module.init, jax.random.PRNGKey(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(step)
    arrays = {
        path: rng.uniform(0.5, 1.5, x.shape).astype(np.float32) * (-1) ** (path[-1] == "kernel")
        for path, x in flatten_dict(shapes).items()
    }
    return unflatten_dict(arrays)


def state_of(step: int) -> TrainState:
    """What a method carries at that step, with more in it than the encoder."""
    online, target = variables_of(step), variables_of(step + 1)
    head = {"kernel": np.full((2, 3), 7.0, np.float32)}
    params = {"encoder": online["params"], "projector": head}
    return TrainState(
        step=np.int32(step),
        rng=np.asarray([0, 3], np.uint32),
        online_params=params,
        target_params={"encoder": target["params"], "projector": head},
        online_stats={"encoder": online["batch_stats"], "projector": {"mean": np.ones(3)}},
        target_stats={"encoder": target["batch_stats"]},
        opt_state=optax.trace(0.9).init(params),
    )


def write_run(
    workdir: pathlib.Path, steps=STEPS, config=CONFIG, data_info="data_info"
) -> pathlib.Path:
    checkpoints = checkpoint.Checkpoints(str(workdir), keep=99)
    meta = {"config": config, data_info: {"num_classes": 3}, "examples": 0}
    for step in steps:
        checkpoints.take(parallel.replicate(lambda s: s, state_of(step)), meta)
        checkpoints.write()
        checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run with three checkpoints; a test that breaks something takes a copy."""
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def copy(run, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------- a run's own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "step", "expected"),
    [
        ("", None, 100),
        ("", 20, 20),
        ("checkpoints", None, 100),
        ("checkpoints/40", None, 40),
        ("checkpoints/40/", None, 40),
    ],
)
def test_the_online_encoder_of_a_step(run, path, step, expected):
    """The newest of a workdir or the one that is named, bit for bit; reading changes nothing."""
    before = contents(run)
    frozen = encoder.load(f"{run}/{path}", step)
    assert_same(frozen.variables, variables_of(expected))
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(frozen.variables))
    assert (frozen.step, frozen.run) == (expected, str(run))
    assert pathlib.Path(frozen.path) == run / "checkpoints" / str(expected)
    assert frozen.config == CONFIG | {"data_info": {"num_classes": 3}}
    assert frozen.normalization == (tuple(MEAN), tuple(STD))
    assert frozen.about == {
        "checkpoint": frozen.path,
        "run": str(run),
        "step": expected,
        "method": "byol",
        "run_seed": 3,
    }
    assert contents(run) == before


@pytest.mark.slow
def test_a_home_folder_and_a_relative_path(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("HOME", str(run.parent))
    for path in ("run", "~/run", "run/checkpoints/100", "./run/"):
        assert encoder.locate(path) == (str(run), 100)


def test_a_checkpoint_that_is_being_written_is_not_there(copy):
    """And is left alone: its writer is another process, which has not finished."""
    checkpoints = copy / "checkpoints"
    unfinished = checkpoints / "400.orbax-checkpoint-tmp-1700000000"
    shutil.copytree(checkpoints / "100" / "meta", unfinished / "meta")
    (unfinished / "state.orbax-checkpoint-tmp-1700000001").mkdir()
    (checkpoints / "notes.txt").write_text("not a step")
    before = contents(copy)
    assert encoder.checkpoint_steps(str(copy)) == list(STEPS)
    assert encoder.load(str(copy)).step == 100
    assert contents(copy) == before
    assert (unfinished / "state.orbax-checkpoint-tmp-1700000001").is_dir()


# ---------------------------------------------------------------------- carrying it away


@pytest.mark.slow
def test_an_exported_encoder_is_the_one_it_came_from(run, tmp_path):
    """Its arrays bit for bit, what is needed to use it, and nothing of the run's paths."""
    frozen = encoder.load(str(run), 40)
    folder = tmp_path / "new" / "encoder"
    encoder.export(frozen, str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.json", "encoder.npz"]
    again = encoder.load(str(folder))
    assert_same(again.variables, frozen.variables)
    assert (again.path, again.run, again.step) == (str(folder), None, 40)
    kept = ("encoder", "views", "data", "compute_dtype", "method", "seed", "data_info")
    assert again.config == {k: frozen.config[k] for k in kept}
    assert again.about["method"] == "byol" and again.about["run_seed"] == 3
    # Anyone can read it, with NumPy alone.
    with np.load(folder / "encoder.npz", allow_pickle=False) as arrays:
        stem = arrays["params/stem/kernel"]
        np.testing.assert_array_equal(stem, variables_of(40)["params"]["stem"]["kernel"])
        assert set(arrays.files) == set(flatten(frozen.variables))
    # Written over, and carried on from there.
    encoder.export(encoder.load(str(run), 20), str(folder))
    encoder.export(encoder.load(str(folder)), str(tmp_path / "second"))
    assert_same(encoder.load(str(tmp_path / "second")).variables, variables_of(20))


def test_a_folder_that_takes_no_files_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        encoder.export(encoder.load(str(run)), str(tmp_path / "file" / "encoder"))


# ------------------------------------------------------------- what earlier versions wrote

NEWER = CONFIG | {
    "data": {"name": "folder", "image_size": 8, "train_split": "train"} | READING,
    "views": {
        "global": {
            "count": 2,
            "size": 8,
            "area": [0.2, 1.0],
            "aspect": [0.75, 1.25],
            "view_1": {"flip_prob": 0.25, "blur_prob": 1.0},
            "view_2": {"flip_prob": 0.25, "blur_prob": 0.1},
        },
        "mean": MEAN,
        "std": STD,
    },
}


def of_earlier_version(config):
    """The config with the names that its fields had before `views` and `data_info`."""
    group = config["views"]["global"]
    crops = {"crop_area": group["area"], "crop_aspect": group["aspect"]}
    augment = {name: group[name] for name in ("view_1", "view_2")} | {"mean": MEAN, "std": STD}
    found = {"found": config["data_info"]} if "data_info" in config else {}
    older = {k: v for k, v in config.items() if k not in ("views", "data_info")}
    return older | {"data": config["data"] | crops, "augment": augment} | found


@pytest.mark.slow
def test_an_encoder_that_an_earlier_version_exported_is_read(tmp_path):
    """As if this version had written it; its own export has the names of today."""
    run = write_run(tmp_path / "run", steps=(5,), config=NEWER)
    folder, again = tmp_path / "exported", tmp_path / "again"
    encoder.export(encoder.load(str(run)), str(folder))
    written = (folder / "encoder.json").read_bytes()
    about = json.loads(written)
    older = of_earlier_version(about["config"])
    assert older.keys() == about["config"].keys() - {"views", "data_info"} | {"augment", "found"}
    (folder / "encoder.json").write_text(json.dumps(about | {"config": older}))
    frozen = encoder.load(str(folder))
    assert frozen.config == about["config"] | {"data_info": {"num_classes": 3}}
    assert frozen.normalization == (tuple(MEAN), tuple(STD))
    assert_same(frozen.variables, variables_of(5))
    encoder.export(frozen, str(again))
    assert json.loads((again / "encoder.json").read_text()) == json.loads(written)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    older = of_earlier_version(NEWER)
    run = write_run(tmp_path / "run", steps=(5,), config=older, data_info="found")
    frozen = encoder.load(str(run))
    assert frozen.config == NEWER | {"data_info": {"num_classes": 3}}
    assert_same(frozen.variables, variables_of(5))


# ------------------------------------------------------------------------ what isn't there


def refused(path, step=None) -> str:
    """The one line that is told."""
    with pytest.raises(UserError) as e:
        encoder.load(str(path), step)
    line = str(e.value)
    assert len(line.splitlines()) == 1 and len(line) < 500
    return line


def test_what_is_not_there_is_told(run, tmp_path):
    assert "config.checkpoint" in refused("")
    missing = tmp_path / "missing"
    assert str(missing) in refused(missing)
    assert str(tmp_path) in refused(tmp_path)  # an empty folder
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(tmp_path / "file")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # a run before its first checkpoint
    assert "no checkpoint" in refused(tmp_path / "run")
    # A step that isn't there, with those that are.
    for line in (refused(run, 30), refused(run / "checkpoints" / "30")):
        assert "30" in line and "20, 40, 100" in line


@pytest.mark.parametrize("damage", ["a file's end", "a file", "meta", "state"])
def test_a_broken_checkpoint_is_told(copy, damage):
    """Whatever is missing of it; the others can still be read."""
    folder = copy / "checkpoints" / "100"
    if damage == "meta":
        (folder / "meta" / "metadata").write_text("{")
    elif damage == "state":
        shutil.rmtree(folder / "state")
    else:
        files = [p for p in (folder / "state").rglob("d/*") if p.is_file()]
        assert files
        for file in files:
            if damage == "a file":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert str(folder) in refused(copy)
    assert_same(encoder.load(str(copy), 40).variables, variables_of(40))


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 3, 100, -100])
def test_a_truncated_export_is_told(run, tmp_path, size):
    encoder.export(encoder.load(str(run)), str(tmp_path))
    file = tmp_path / "encoder.npz"
    file.write_bytes(file.read_bytes()[:size])
    assert str(tmp_path) in refused(tmp_path)


@pytest.mark.slow
def test_the_numbers_of_an_export_are_finite_float32(run, tmp_path):
    encoder.export(encoder.load(str(run)), str(tmp_path))
    with np.load(tmp_path / "encoder.npz") as stored:
        arrays = dict(stored)
    for dtype in ("<f8", ">f4", "<f2"):
        np.savez(tmp_path / "encoder.npz", **{k: v.astype(dtype) for k, v in arrays.items()})
        loaded = flatten_dict(encoder.load(str(tmp_path)).variables, sep="/")
        assert {str(x.dtype) for x in loaded.values()} == {"float32"}
        assert_same(loaded, {k: v.astype(dtype).astype(np.float32) for k, v in arrays.items()})
    name = sorted(arrays)[0]
    for value in (np.nan, 1e300):  # which float32 does not have
        np.savez(tmp_path / "encoder.npz", **arrays | {name: np.full(arrays[name].shape, value)})
        assert f"{name} has values that are not finite" in refused(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"config": null}', '{"step": 3}', '{"config": {}, "step": "x"}']
)
def test_an_export_with_another_description_is_told(run, tmp_path, text):
    encoder.export(encoder.load(str(run)), str(tmp_path))
    (tmp_path / "encoder.json").write_text(text)
    assert str(tmp_path) in refused(tmp_path)
    (tmp_path / "encoder.npz").unlink()
    assert str(tmp_path) in refused(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depth": 34}, "stage1_block3"),
        ({"width": 0.008}, "stage3_block1"),
        ({"stem": "imagenet"}, "stem/kernel"),
        ({"depth": 19}, "19"),
        ({"fields": 1}, "fields"),
    ],
)
def test_a_config_of_another_architecture_is_told(run, tmp_path, changes, named):
    """Of an export; a run's goes the same way."""
    encoder.export(encoder.load(str(run)), str(tmp_path))
    about = json.loads((tmp_path / "encoder.json").read_text())
    about["config"]["encoder"] |= changes
    (tmp_path / "encoder.json").write_text(json.dumps(about))
    line = refused(tmp_path)
    assert str(tmp_path) in line and named in line


@pytest.mark.slow
def test_a_run_of_another_architecture_is_told(tmp_path):
    """A run of other networks: a config without an encoder's section, and one of other shapes."""
    for name, config in (
        ("wider", CONFIG | {"encoder": CONFIG["encoder"] | {"width": 0.008}}),
        ("none", {k: v for k, v in CONFIG.items() if k != "encoder"}),
    ):
        run = write_run(tmp_path / name, steps=(5,), config=config)
        assert str(run / "checkpoints" / "5") in refused(run)


# ---------------------------------------------------------------------------- using it


@pytest.mark.slow
def test_an_untrained_encoder_has_the_shapes_and_no_more(run):
    """The same from the same seed, another from another, and nothing of the run's numbers."""
    frozen = encoder.load(str(run))
    draw = jax.jit(lambda seed: encoder.untrained(frozen.config, seed))  # compiled in one piece
    first, same, other = (jax.device_get(draw(seed)) for seed in (0, 0, 1))
    shapes = jax.tree.map(np.shape, frozen.variables)
    assert jax.tree.map(np.shape, first) == jax.tree.map(np.shape, other) == shapes
    assert_same(first, same)
    kernels = [k for k in flatten(first) if k.endswith("kernel")]
    assert len(kernels) == 20
    for name in kernels:
        assert (flatten(first)[name] != flatten(other)[name]).all()
        assert (flatten(first)[name] != flatten(frozen.variables)[name]).all()
    assert {x.dtype for x in flatten(first).values()} == {np.dtype(np.float32)}
    encoder.check(frozen._replace(variables=first))


@pytest.mark.slow
def test_the_module_is_the_runs_network(run):
    """In the run's type of number unless another is asked for."""
    frozen = encoder.load(str(run))
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    for dtype in ("", "bfloat16", "float32"):
        wanted = jnp.dtype(dtype or "bfloat16")
        module = resnet.ResNet(**ENCODER, dtype=wanted)
        assert encoder.module(frozen.config, dtype) == module
    represent = encoder.module(frozen.config, "float32").apply
    both = jax.jit(lambda a, b: (represent(a, images), module.apply(b, images)))
    found, expected = both(frozen.variables, variables_of(100))
    assert found.dtype == np.float32 and found.shape == (3, module.num_features)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
