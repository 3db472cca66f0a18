"""The notebook runs from top to bottom, and is stored without what it shows."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
import zipfile
from typing import ClassVar

import pytest
from conftest import REPOSITORY, process_env

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = REPOSITORY / "notebooks" / "byol_colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


class Recorded:
    """In place of `subprocess.Popen`: it ends well, and nothing was run."""

    commands: ClassVar[list[list[str]]] = []
    stdout = ()

    def __init__(self, command, **_):
        self.commands.append(command)

    def wait(self):
        return 0


def begin(notebook, monkeypatch, source=""):
    """Runs the cells before the training; returns their names, or the line that ended them."""
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(Recorded, "commands", [])
    names: dict = {}
    first, second = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:2]
    try:
        exec(first.replace('SOURCE = ""', f"SOURCE = {source!r}"), names)
        exec(second, names)
    except SystemExit as e:
        assert len(str(e).splitlines()) == 1
        return str(e)
    return names


def test_where_the_library_comes_from(notebook, tmp_path, monkeypatch):
    """A clone around the notebook, a zip or a wheel; else one line says what is missing."""
    monkeypatch.chdir(REPOSITORY / "notebooks")
    assert begin(notebook, monkeypatch)["LIBRARY"] == str(REPOSITORY)
    monkeypatch.chdir(tmp_path)
    assert "SOURCE is empty" in begin(notebook, monkeypatch)
    assert "cannot be read" in begin(notebook, monkeypatch, "missing.zip")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("other-main/setup.py", "")
    assert "another project's" in begin(notebook, monkeypatch)  # the one file that is there
    with zipfile.ZipFile("ours.zip", "w") as archive:
        archive.writestr("ours-main/run_experiment.py", "")
    assert "one .zip or .whl: ['o" in begin(notebook, monkeypatch)
    found = begin(notebook, monkeypatch, "ours.zip")
    assert found["LIBRARY"] == str(tmp_path / "selfsup" / "ours-main")
    shutil.rmtree("selfsup")
    found = begin(notebook, monkeypatch, "ours.whl")
    assert Recorded.commands[0][1:] == ["-m", "pip", "install", "--quiet", "ours.whl"]
    assert found["LIBRARY"] == str(REPOSITORY)  # what is installed here


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """On digits, with an encoder that compiles quickly and a few steps."""
    flags = {
        "steps": 3,
        "optimizer.warmup_steps": 1,
        "batch_size": 16,
        "encoder.width": 0.0625,
        "projector.hidden_sizes": "(8,)",
        "predictor.hidden_sizes": "(8,)",
        "data.image_size": 8,
        "data.test_resize": 8,
        "monitor.knn_train_images": 64,
        "monitor.knn_test_images": 32,
        "monitor.diagnostics_every_steps": 0,
        "monitor.map_images": 24,
        "monitor.plots_every_steps": 3,
        "eval.max_train_images": 128,
        "eval.max_test_images": 64,
        "eval.random_init": False,
        "eval.linear.C": "(0.1,)",
        "eval.fewshot_draws": 1,
    }
    given = [f"--config.{name}={value}" for name, value in flags.items()]
    env = process_env() | {
        "NOTEBOOK_DATA": "digits",
        "NOTEBOOK_RUN": str(tmp_path / "run"),
        "NOTEBOOK_FLAGS": " ".join([*given, f"--compilation_cache={tmp_path / 'compiled'}"]),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    execute(notebook, REPOSITORY)
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    text = "".join(o.text for o in shown if o.output_type == "stream")
    assert "this encoder   linear probe " in text and "raw pixels     linear probe " in text
    data = [o.data for o in shown if o.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in each for each in data) == 4
    assert "iframe" in data[-1]["text/html"]
    assert os.path.getsize(tmp_path / "run" / "report.html") > 10_000


# ----------------------------------------------------------- notebooks that import the library

# What compiles quickly, and a few steps.
TINY = {
    "steps": 4,
    "optimizer__warmup_epochs": 0.0,
    "batch_size": 16,
    "encoder__width": 0.0625,
    "projector__hidden_sizes": (8,),
    "views__global__view_1__jitter_prob": 0.0,
    "views__global__view_1__blur_prob": 0.0,
    "data__image_size": 8,
    "data__test_resize": 8,
    "monitor__knn_train_images": 64,
    "monitor__knn_test_images": 32,
    "monitor__diagnostics_every_steps": 2,
    "monitor__map_images": 24,
    "eval__max_train_images": 128,
    "eval__max_test_images": 64,
    "eval__random_init": False,
    "eval__pixels": False,
    "eval__linear__C": (0.1,),
    "eval__fewshot_draws": 1,
}


IMPORTING = ("own_images", "compare_methods", "write_your_own_method")


def read(name):
    return nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", IMPORTING)
def test_each_is_valid_and_holds_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    assert code[0].source == read(IMPORTING[0]).cells[1].source  # the installation


def test_what_is_installed(tmp_path, monkeypatch):
    """Nothing where the library is there; else a clone's address, or the one uploaded file."""
    commands = []
    install = read(IMPORTING[0]).cells[1].source

    def pip(command, status=0):
        commands.append(command[-1])
        return types.SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(REPOSITORY / "notebooks")
    exec(install, {})
    assert not commands and sys.path[0] == str(REPOSITORY)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    with pytest.raises(SystemExit, match=r"SOURCE is empty: give the address .*: \[\]$"):
        exec(install, {})
    exec(install.replace('SOURCE = ""', 'SOURCE = "https://example.org/a"'), {})
    (tmp_path / "main.zip").touch()
    exec(install, {})
    expected = ["selfsup-jax[gpu] @ git+https://example.org/a", f"{tmp_path}/main.zip[gpu]"]
    assert commands == expected
    monkeypatch.setattr(subprocess, "run", lambda command: pip(command, status=1))
    with pytest.raises(SystemExit, match=r"cannot be installed: pip's lines above say why$"):
        exec(install, {})


def execute(notebook, folder):
    """Runs all cells in a kernel of their own; raises what a cell raises."""
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)


def run_notebook(name, tmp_path, monkeypatch, **settings):
    """What the cells of a notebook show: (its text, the kinds of its other outputs)."""
    notebook = read(name)
    env = process_env() | {
        "NOTEBOOK_SETTINGS": repr(TINY | settings),
        "NOTEBOOK_RUN": str(tmp_path / "run"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    execute(notebook, REPOSITORY / "notebooks")
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    text = "".join(o.text for o in shown if o.output_type == "stream")
    data = [o.data for o in shown if o.output_type in ("display_data", "execute_result")]
    return text, data


@pytest.mark.slow
def test_own_images(tmp_path, monkeypatch):
    text, data = run_notebook(
        "own_images", tmp_path, monkeypatch, predictor__hidden_sizes=(8,), epochs=1.0
    )
    assert "600 files in" in text and "(500, 32)" in text and "collapsed: False" in text
    assert "50 labels: " in text and "of 100 held-out images" in text
    assert "this encoder   all labels" in text
    assert sum("image/png" in each for each in data) == 4
    assert (tmp_path / "run" / "encoder" / "encoder.npz").exists()


@pytest.mark.slow
def test_compare_methods(tmp_path, monkeypatch):
    text, data = run_notebook("compare_methods", tmp_path, monkeypatch, eval__random_init=True)
    assert "byol          projection std" in text and "moco          projection std" in text
    table = next(each["text/markdown"] for each in data if "text/markdown" in each).splitlines()
    assert table[0] == "|  | linear probe | few labels | kNN | images/s |" and len(table) == 6
    assert table[4].startswith("| moco | ") and table[5].startswith("| moco, never trained | ")
    assert "2 runs" in text and "iframe" in data[-1]["text/html"]
    assert sum("image/png" in each for each in data) == 1


@pytest.mark.slow
def test_write_your_own_method(tmp_path, monkeypatch):
    """It equals `simsiam_jax`, and collapses without its stop-gradient."""
    settings = {
        "steps": 30,
        "optimizer__learning_rate": 3.0,
        "projector__output_size": 8,
        "predictor__output_size": 8,
        "eval__enabled": False,
    }
    text, data = run_notebook("write_your_own_method", tmp_path, monkeypatch, **settings)
    assert "error: config.predictor.output_size=7: must be 256" in text
    assert "   with stop-gradient: " in text and "collapsed: False" in text
    assert "largest difference" in text and "WARNING: the run has collapsed" in text
    assert "without stop-gradient: loss -0.9" in text and "collapsed: True" in text
    assert (tmp_path / "run" / "run" / "results.json").exists()
    assert sum("image/png" in each for each in data) == 2
