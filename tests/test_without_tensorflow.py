"""Digits, arrays and folders are read, trained on and evaluated without TensorFlow."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs
from conftest import REPOSITORY, process_env
from test_layers import imports, parsed

from selfsup_jax.data import decode, sources

# `tensorflow_datasets` imports TensorFlow only when a data set is read.
LIBRARIES = ("tensorflow", "tensorflow_datasets")


def modules_without() -> list[str]:
    """Every module of ours that needs no TensorFlow: all but those for TFDS."""
    names = {}
    for path, (module, *_) in parsed().items():
        if path.suffix == ".py" and path.parts[0] != "configs":
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            top = tuple(n for n in module.body if isinstance(n, ast.Import | ast.ImportFrom))
            parts = [part.split(".") for part in imports(top)]
            names[name] = {".".join(part[:n]) for part in parts for n in range(1, 5)}
    needing = {"tensorflow", "tensorflow_datasets"}
    while new := {name for name, used in names.items() if used & needing} - needing:
        needing |= new
    readers = ("host_tensorflow", "tensorflow_variables", "tfds")
    assert needing - set(LIBRARIES) == {f"selfsup_jax.data.{name}" for name in readers}
    return sorted(set(names) - needing)


# The entry point, and every module, in a process in which TensorFlow cannot be imported.
PROGRAM = """
import importlib, json, sys
for name in {libraries}:
    sys.modules[name] = None
for name in {modules}:
    importlib.import_module(name)
from selfsup_jax.models import resnet
resnet.STAGES[2] = ((0, 0, 0, 1), False)  # an encoder of one block, which compiles at once
import run_experiment
from configs import {configs}
from ml_collections import ConfigDict
run_experiment.parse_flags(["run_experiment.py", *{arguments}])
run_experiment.main([])
for job, preset, fields, workdir in {jobs}:
    config = globals()[job].get_config(preset)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    run_experiment.run_job(config, workdir)
assert not [name for name in {libraries} if sys.modules[name] is not None]
print("loaded", sorted(name for name in sys.modules if name.startswith("tensorflow")))
"""


def fields(folder, **changes) -> dict:
    """A run of three steps with everything on the way, and with probes at its end."""
    tiny = {
        "steps": 3,
        "log_every_steps": 1,
        "encoder.depth": 2,
        "encoder.width": 0.03,
        "encoder.stem": "cifar",
        "projector.hidden_sizes": (8,),
        "predictor.hidden_sizes": (8,),
        "projector.output_size": 4,
        "predictor.output_size": 4,
        "monitor.map_images": 12,
        "monitor.knn_train_images": 40,
        "monitor.reference": "",
        "eval.linear.C": (1.0,),
        "eval.random_init": False,
    }
    return tiny_runs.fields(folder, **changes) | tiny


def as_argument(name: str, value) -> str:
    return f"--config.{name}={value}"


@pytest.mark.slow
def test_every_kind_of_job_runs_without_it(tmp_path):
    """Digits, arrays in a file, and a folder with an embedding and two probes of its encoder."""
    images = tiny_runs.write_images(tmp_path / "images", 2, 60)
    source = decode.into_array(sources.load("folder", str(images), "train", "split"))
    np.savez(tmp_path / "arrays.npz", train_images=source.images, train_labels=source.labels)
    each = {"eval.max_train_images": 60, "eval.max_test_images": 30}
    digits = fields("", data__name="digits") | each
    digits |= {"monitor.knn_every_steps": 3}
    arguments = [
        "--config=configs/byol.py:demo",
        f"--workdir={tmp_path / 'digits'}",
        "--compilation_cache=",
        *(as_argument(name, value) for name, value in digits.items()),
    ]
    run = str(tmp_path / "run")
    arrays = fields(tmp_path / "arrays.npz", data__name="arrays")
    folder = fields(images, data__name="folder") | {"eval.enabled": True} | each
    probe = {"checkpoint": run, "random_init": False}
    jobs = [
        ("byol", "folder", arrays, str(tmp_path / "of_arrays")),
        ("byol", "folder", folder, run),
        ("knn", None, probe, str(tmp_path / "knn")),
        ("linear_probe", None, probe | {"C": (1.0,)}, str(tmp_path / "linear")),
        ("embed", None, {"checkpoint": run, "split": "train[:10]"}, str(tmp_path / "embed")),
    ]
    program = PROGRAM.format(
        libraries=LIBRARIES,
        modules=modules_without(),
        configs=", ".join(sorted({job for job, *_ in jobs})),
        arguments=arguments,
        jobs=jobs,
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        **{"cwd": REPOSITORY, "env": process_env(), "timeout": 300},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"loaded {sorted(LIBRARIES)}"  # as None
    for name in ("digits", "of_arrays", "run"):
        assert json.loads((tmp_path / name / "results.json").read_text())["steps"] == 3
        assert list((tmp_path / name).glob("events.*"))
    assert "knn_top1" in json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("knn", "linear", "embed"):
        assert json.loads((tmp_path / name / "results.json").read_text())
    with np.load(tmp_path / "embed" / "features.npz") as features:
        assert features["features"].shape[0] == 10
