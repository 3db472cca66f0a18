"""Configs by name, methods and views from Python, and the command `selfsup`."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys

import command_lines
import jax
import numpy as np
import pytest
import tiny_runs
from conftest import REPOSITORY, process_env

import run_experiment
import selfsup_jax
from configs import byol
from selfsup_jax import console, presets
from selfsup_jax.data import inputs
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.models import resnet

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 9, 11, 3)).astype(np.uint8)


# --------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["byol:demo", "byol.py:demo", "configs/byol.py:demo"])
def test_a_config_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever one is
    config = selfsup_jax.load_config(name, batch_size=32, data__dir="images")
    expected = byol.get_config("demo")
    expected.batch_size, expected.data.dir = 32, "images"
    assert config == expected
    config.batch_size = 8  # it is one's own


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from configs import byol\ndef get_config(arg=None):\n    return byol.get_config('demo')"
    (tmp_path / "byol").write_text(text.replace("demo", "folder"))
    (tmp_path / "mine.py").write_text(text)
    assert selfsup_jax.load_config("mine.py").data.name == "digits"
    assert selfsup_jax.load_config("byol").data.name == "folder"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("byl", {}, "did you mean configs/byol.py?"),
        ("configs/moko.py:v1", {}, "did you mean configs/moco.py?"),
        ("byol:demi", {}, "unknown preset 'demi'; did you mean: demo?"),
        ("byol:demo", {"batchsize": 3}, "unknown field config.batchsize; did you mean: batch_size"),
        ("byol:demo", {"steps": "many"}, "config.steps='many': must be of type int"),
        ("common", {}, "--config=common: cannot be read"),
    ],
)
def test_a_mistake_in_a_name_is_one_line(name, fields, message):
    with pytest.raises(UserError) as raised:
        selfsup_jax.load_config(name, **fields)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_package_of_the_same_name_is_left_alone(tmp_path):
    """Many projects have a `configs`."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("THEIRS = 1")
    (tmp_path / "configs" / "byol.py").write_text("THEIRS = 2")
    program = f"""
import sys
import configs, configs.byol
sys.path.append({str(REPOSITORY)!r})
import selfsup_jax
assert selfsup_jax.load_config("byol:demo").data.name == "digits"
assert selfsup_jax.load_config("moco:demo").queue_size == 1024
import configs.byol as again
assert configs.THEIRS == 1 and again.THEIRS == 2 and again is configs.byol
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_all_presets_are_listed():
    listed = {f"configs/{config.name}.py": config for config in presets.listed()}
    found = {name: tuple(config.presets) for name, config in listed.items()}
    assert found == command_lines.presets()
    for config in listed.values():
        assert config.title.endswith(".") and all(config.presets.values()), config.name


# --------------------------------------------------------------------------------- commands


def test_the_list_has_a_line_for_each(capsys):
    assert console.run(["selfsup", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for config in presets.listed():
        assert sum(line.startswith(f"  {config.name} ") for line in lines) == 1
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["demo"], ["--config=byol:demo", "--workdir=runs/demo"]),
        (["demo", "moco"], ["--config=moco:demo", "--workdir=runs/demo_moco"]),
        (
            ["demo", "--workdir=x", "--config.steps=3"],
            ["--config=byol:demo", "--workdir=x", "--config.steps=3"],
        ),
        (["--config=byol"], ["--config=byol"]),
    ],
)
def test_runs_have_the_flags_of_run_experiment(words, flags):
    argv = ["selfsup", *words]
    assert console.run(argv) is None and argv[1:] == flags


def test_commands_of_other_modules(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selfsup", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run_experiment.console()
    assert ended.value.code == 2 and "holds no checkpoint" in capsys.readouterr().err
    assert console.run(["selfsup"]) == 0 and "selfsup list" in capsys.readouterr().out


def test_a_reader_that_has_enough_gets_no_traceback():
    """As `head`, after `selfsup list |`."""
    program = "import run_experiment, sys; sys.argv = ['selfsup', 'list']; run_experiment.console()"
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, env=process_env(), **pipes) as listing:
        listing.stdout.close()  # before anything is written
        assert (listing.stderr.read(), listing.wait()) == (b"", 141)


@pytest.mark.parametrize("word", console._MODULES)
def test_a_command_ends_with_its_module(word, monkeypatch):
    """Also if that returns nothing: its words are not read as flags of a run."""
    module = importlib.import_module(console._MODULES[word])
    for returned, status in ((None, 0), (0, 0), (2, 2)):
        monkeypatch.setattr(module, "main", lambda returned=returned: returned)
        assert console.run(["selfsup", word, "a", "b"]) == status


def test_a_misspelt_command_is_one_line():
    with pytest.raises(UserError, match=r"selfsup reprot: is no command; did you mean report;"):
        console.run(["selfsup", "reprot"])


# ---------------------------------------------------------------------------------- training


@pytest.fixture
def tiny_config(monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 2, tiny_runs.ONE_BLOCK)
    return selfsup_jax.load_config("byol:demo", steps=4, batch_size=8, encoder__depth=2)


def test_views_are_those_of_a_run(tiny_config, tmp_path):
    np.savez(tmp_path / "images.npz", train_images=IMAGES, train_labels=np.arange(24) % 3)
    run = tiny_config.copy_and_resolve_references()
    run.update_from_flattened_dict(
        {"data.name": "arrays", "data.dir": str(tmp_path / "images.npz")}
    )
    data = inputs.load_data(run)
    feed = inputs.feed(run, data.train)
    batch = next(inputs.train_batches(run, data, 2))
    rows, labels = batch["row"], data.train.labels
    expected = inputs.with_views(feed, 2, {k: v for k, v in batch.items() if k != "name"})
    views = selfsup_jax.make_views(tiny_config)(2, IMAGES[rows], labels[rows])
    assert views.keys() == expected.keys()
    for name in views:
        np.testing.assert_array_equal(views[name], expected[name])


@pytest.mark.slow
def test_a_loop_of_ones_own(tiny_config):
    """As in `library.py`'s docstring; the encoder is the state's."""
    before = tiny_config.to_json()
    method = selfsup_jax.build_method(tiny_config, num_images=len(IMAGES), num_classes=3)
    state = first = jax.jit(method.init_state)(jax.random.PRNGKey(tiny_config.seed))
    step = jax.jit(method.train_step)
    views = selfsup_jax.make_views(tiny_config)
    for i in range(2):
        state, metrics = step(state, views(i, IMAGES[8 * i : 8 * i + 8], np.arange(8) % 3))
    assert tiny_config.to_json() == before and int(state.step) == 2
    assert np.isfinite(metrics["loss"]) and "probe_top1" in metrics
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first, state)
    assert all(jax.tree.leaves(moved.online_params)) and any(jax.tree.leaves(moved.target_params))
    trained = selfsup_jax.Encoder.of_state(tiny_config, state)
    config = trained.config
    fresh = encoder.FrozenEncoder(encoder.untrained(config, 0), config, "", None, 0)
    features, other = (e.transform(IMAGES) for e in (trained, selfsup_jax.Encoder(fresh)))
    assert features.shape == (24, trained.num_features) and (features != other).any()


def test_mistakes_are_told_before_anything_is_compiled(tiny_config):
    views = selfsup_jax.make_views(tiny_config)
    for images in (IMAGES.astype(np.float32)[:8], IMAGES[:3]):
        with pytest.raises(UserError, match=r"must be uint8 \[8, H, W, 3\]"):
            views(0, images)
    with pytest.raises(UserError, match=r"batch_size=8: must be at most the 3 images"):
        selfsup_jax.build_method(tiny_config, num_images=3)
    with pytest.raises(UserError, match=r"config\.job='knn': must be pretrain"):
        selfsup_jax.build_method(selfsup_jax.load_config("knn"), 10)
    tiny_config.tau_base = 2.0
    with pytest.raises(UserError, match=r"config\.tau_base=2\.0"):
        selfsup_jax.build_method(tiny_config, 24)


# ------------------------------------------------------------------------------- installation


@pytest.mark.slow
def test_a_wheel_has_all_that_a_run_needs(tmp_path):
    """Installed elsewhere than the clone, and used from an empty folder."""
    make = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    clone = tmp_path / "clone"
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "benchmarks", "*.egg-info", "build")
    shutil.copytree(REPOSITORY, clone, ignore=left_out)  # building leaves files behind
    subprocess.run([*make, tmp_path / "dist", clone], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*pip, tmp_path / "installed", wheel], check=True)
    (tmp_path / "empty").mkdir()
    env = process_env() | {"PYTHONPATH": str(tmp_path / "installed")}
    program = "import run_experiment, sys; sys.argv[0] = 'selfsup'; run_experiment.console()"

    def selfsup(*words):
        line = [sys.executable, "-c", program, *words]
        return subprocess.run(line, cwd=tmp_path / "empty", env=env, capture_output=True, text=True)

    assert "byol" in selfsup("list").stdout
    run = ["demo", "--workdir=run", "--config.steps=2", "--config.eval.enabled=False"]
    done = selfsup(*run, "--config.encoder.width=0.1", "--config.batch_size=8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty" / "run" / "results.json").exists()
    report = selfsup("report", "run")
    assert report.returncode == 0, report.stderr
