"""Files beside a run's checkpoints that are not what they were: one line each."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tiny_runs

from selfsup_jax.data import sources
from selfsup_jax.errors import UserError
from selfsup_jax.jobs import follow, linear_probe, transfer
from selfsup_jax.run import files, identity, workdir
from selfsup_jax.training import pretrain, sweep


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config, and the workdir of its finished run."""
    top = tmp_path_factory.mktemp("finished")
    images = tiny_runs.write_images(top / "images", 3, 60)
    config = tiny_runs.tiny_config(images, steps=2)
    pretrain.pretrain(config, str(top / "run"), tiny_runs.build)
    return config, top / "run"


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"[" * 99_999])
def test_damaged_results_are_told_and_written_anew(finished, capfd, content):
    config, folder = finished
    (folder / "results.json").write_bytes(content)
    results = pretrain.pretrain(config, str(folder), tiny_runs.build)
    assert json.loads((folder / "results.json").read_text()) == results
    assert "images_per_second" not in results
    told = [line for line in capfd.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(told) == 1 and told[0].startswith(f"{folder}/results.json: cannot be read: ")


META = {"config": {}, "data_info": {}, "versions": {}, "undecodable": [], "host_count": 1}


@pytest.mark.parametrize("name", META)
def test_a_meta_without_a_field_is_told(name):
    assert workdir.checked_meta(META, "here") == META
    for damaged in ({k: v for k, v in META.items() if k != name}, META | {name: "7"}):
        with pytest.raises(UserError, match=rf"^--workdir=here: the meta .* {name}=.*; move"):
            workdir.checked_meta(damaged, "here")


def test_a_config_with_unknown_values_is_one_line():
    with pytest.raises(UserError, match=r"config\.projector\.style=\['byol'\]: must be one of"):
        identity.upgraded({"projector.hidden_size": 3, "projector.style": ["byol"]})
    odd = {"optimizer.schedule": ["cosine"], "tau_schedule": {}}
    assert identity.steps_free(odd, odd)


@pytest.mark.parametrize(
    "entry", [7, {}, {"config": [], "results": {}, "seconds": 1}, {"config": {}, "results": {}}]
)
def test_an_entry_of_a_record_that_is_none_is_named(tmp_path, entry):
    files.write_json(str(tmp_path / "runs.json"), {"low/seed_0": entry})
    with pytest.raises(UserError, match=r"runs\.json: low/seed_0 is not a run's entry"):
        sweep._read_record(str(tmp_path))


def save_heads(path, **arrays):
    np.savez(path, **({"kernel": np.zeros((2, 4, 3)), "bias": np.zeros((2, 3))} | arrays))


def test_a_damaged_classifier_is_named(tmp_path):
    path = tmp_path / "classifier.npz"
    save_heads(path)
    assert linear_probe._read_heads(str(path), 2, 3)["kernel"].shape == (2, 4, 3)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 1
    for content in (b"", whole[:-20], whole[:99], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"classifier\.npz: cannot be read: .*; move it away"):
            linear_probe._read_heads(str(path), 2, 3)
    for arrays in ({"bias": np.zeros(3)}, {"kernel": np.zeros(4)}, {"bias": np.array([{}])}):
        save_heads(path, **arrays)
        with pytest.raises(UserError, match=r"classifier\.npz: cannot be read: "):
            linear_probe._read_heads(str(path), 2, 3)


def test_damaged_results_of_sets_are_named():
    good = {"transfer_pets": 0.5, "transfer_pets_metric": "top1"}
    transfer._check_done(good, "sets.json")
    for change in ({"transfer_pets_metric": []}, {"transfer_pets": "0.5"}):
        with pytest.raises(UserError, match=r"^sets\.json: transfer_pets_metric="):
            transfer._check_done(good | change, "sets.json")


def test_following_a_run_with_odd_files(tmp_path):
    for name in ("step_00000003", "step_x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    assert follow.done_steps(str(tmp_path)) == [3]
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    os.utime(tmp_path / "config.json", (0, 0))
    for content, told in (("{", "cannot be read"), ('{"steps": "5"}', "is not a number")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match=rf"results\.json: .*{told}"):
            follow.has_ended(str(tmp_path))


def test_names_that_are_not_utf_8(tmp_path):
    """As on disks that were written under another encoding."""
    folder = tiny_runs.write_images(tmp_path / "images", 2, 8)
    os.rename(folder / "class_1", os.fsencode(folder) + b"/cl\xe9")
    os.rename(folder / "class_0" / "0.png", os.fsencode(folder) + b"/class_0/caf\xe9.png")
    source = sources.load("folder", str(folder), "train", "data.train_split")
    assert source.class_names == ("class_0", "cl\ufffd") and source.num_examples == 8
    assert sorted(source.labels) == [0] * 4 + [1] * 4
