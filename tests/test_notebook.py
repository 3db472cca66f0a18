"""The notebook runs from top to bottom, and is stored without what it shows."""

from __future__ import annotations

import os
import shutil
import subprocess
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
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(REPOSITORY)}}
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    text = "".join(o.text for o in shown if o.output_type == "stream")
    assert "this encoder   linear probe " in text and "raw pixels     linear probe " in text
    data = [o.data for o in shown if o.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in each for each in data) == 4
    assert "iframe" in data[-1]["text/html"]
    assert os.path.getsize(tmp_path / "run" / "report.html") > 10_000
