"""Where a run's records go besides its own file: names, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys

import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfsup_jax.config import validate
from selfsup_jax.errors import UserError
from selfsup_jax.run import events, tags
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.wandb_writer import WandbWriter


def settings(project: str = "mine") -> ConfigDict:
    return ConfigDict({"project": project, "entity": ""})


@pytest.mark.parametrize(
    ("name", "group"),
    [
        *[("loss", "train"), ("contrast_top1", "accuracy"), ("grad_norm/encoder", "optimizer")],
        *[("projection_std", "representation"), ("device_memory_gib", "speed")],
        *[("linear_probe_mean_per_class", "accuracy"), ("of_one_method", "train")],
    ],
)
def test_a_scalar_has_one_group(name, group):
    assert tags.grouped(name) == f"{group}/{name}"
    assert tags.grouped(tags.grouped(name)) == tags.grouped(name)


def test_the_points_of_an_earlier_version_go_on_under_their_new_names(tmp_path):
    writer = events.EventWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 1 / step, "images_per_second": 5.0})
    writer.close()
    recorder = Recorder(str(tmp_path), 2, config={"seed": 1})  # not shown: the run is no new one
    recorder.write(3, {"loss": 9.0}, {})
    recorder.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert set(shown.Tags()["scalars"]) == {"train/loss", "speed/images_per_second"}
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(1, 1), (2, 0.5), (3, 9)]
    assert not shown.Tags()["tensors"]


def test_a_run_that_begins_again_shows_only_its_own_config(tmp_path):
    """The first one had saved nothing, and its config was a mistake."""
    for seed in (1, 2):
        recorder = Recorder(str(tmp_path), 0, config={"seed": seed, "job": "pretrain"})
        recorder.write(1, {"loss": 1.0}, {})
        recorder.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    (text,) = shown.Tensors("config")
    assert json.loads(text.tensor_proto.string_val[0])["seed"] == 2


def test_the_writers_have_the_interface_of_clu():
    """Loaded without its package, which imports TensorFlow."""
    (folder,) = importlib.util.find_spec("clu").submodule_search_locations
    path = os.path.join(folder, "metric_writers", "interface.py")
    spec = importlib.util.spec_from_file_location("clu_interface", path)
    interface = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interface)
    names = ("scalars", "images", "texts", "hparams")
    for writer in (events.EventWriter, WandbWriter):
        for name in (*(f"write_{n}" for n in names), "flush", "close"):
            wanted = inspect.signature(getattr(interface.MetricWriter, name)).parameters
            assert list(inspect.signature(getattr(writer, name)).parameters) == list(wanted)


# ------------------------------------------------------------------------ Weights & Biases


def test_two_processes_are_one_run_of_the_project(tmp_path, fake_wandb):
    config = {"seed": 3}
    for first_step, last_step in ((0, 2), (2, 4)):
        writer = WandbWriter(settings(), str(tmp_path), config)
        recorder = Recorder(str(tmp_path), first_step, writers=[writer])
        for step in range(first_step + 1, last_step + 1):
            recorder.write(step, {"loss": float(step)}, {"images_per_second": 7.0})
        recorder.pictures(last_step, {"view_pairs": np.zeros((4, 5, 3), np.uint8)})
        recorder.close()
    first, second = fake_wandb.runs
    assert first.given["id"] == second.given["id"] and first.given["resume"] == "allow"
    assert (first.given["project"], first.given["name"]) == ("mine", tmp_path.name)
    assert first.given["config"] == config and first.finished and second.finished
    logged = [entry for run in (first, second) for entry in run.logged]
    scalars = [(step, values["train/loss"]) for step, values in logged if "train/loss" in values]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    pictures = [(step, v["view_pairs"][0].shape) for step, v in logged if "view_pairs" in v]
    assert pictures == [(2, (4, 5, 3)), (4, (4, 5, 3))]
    # Another project has a run of its own.
    WandbWriter(settings("other"), str(tmp_path), config)
    assert fake_wandb.runs[-1].given["id"] != first.given["id"]


def test_a_missing_package_is_told_before_anything(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny_runs.tiny_config(tmp_path, steps=3, wandb__project="mine")
    with pytest.raises(UserError, match=r"^config\.wandb\.project='mine': .*pip install wandb$"):
        validate(config.copy_and_resolve_references(), tiny_runs.build)
    config.wandb.project = ""
    validate(config.copy_and_resolve_references(), tiny_runs.build)


def test_a_refusal_is_one_line(tmp_path, fake_wandb, monkeypatch):
    def refuse(**given):
        raise RuntimeError("not logged in\nmore")

    monkeypatch.setattr(fake_wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb says: not logged in$"):
        WandbWriter(settings(), str(tmp_path), {})
