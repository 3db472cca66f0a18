"""Workdirs, tables and pages that belong to something else are not written to."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import tiny_jobs
import tiny_runs
from ml_collections import ConfigDict

from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.run import identity, owner
from selfsup_jax.training import pretrain, sweep
from selfsup_jax.viz.report import page


def write(folder: pathlib.Path, **files) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


JOB = {"job": "knn", "data_info": {"checkpoint": "/runs/byol/checkpoints/9"}}
RUN = {"job": "pretrain", "method": "byol"}
OWNERS = {
    "a knn job of /runs/byol/checkpoints/9": {"config": JOB, "results": {}},
    "a pretraining run (byol)": {"config": RUN},
    "a sweep (it has a runs.json)": {"runs": {}, "results": {}},
    "another program (its config.json names no job)": {"config": {"name": "left-pad"}},
    "an unknown job (it has a results.json without a config.json)": {"results": {}},
}


@pytest.mark.parametrize("job", ["pretrain", "sweep", "knn", "embed"])
@pytest.mark.parametrize("name", OWNERS)
def test_only_a_job_of_the_same_kind_may_go_on(tmp_path, name, job):
    folder = write(tmp_path, **OWNERS[name])
    own = {"pretrain": "pretraining", "sweep": "a sweep", "knn": "a knn", "embed": "an embed"}
    if own[job] in name:
        owner.check(str(folder), job)
        return
    with pytest.raises(UserError) as error:
        owner.check(str(folder), job)
    assert str(error.value) == (
        f"--workdir={folder}: belongs to {name}, which a {job} job would overwrite; use another "
        "--workdir"
    )


def test_a_new_workdir_is_anyones(tmp_path):
    owner.check(str(tmp_path), "knn")
    owner.check(str(tmp_path / "none"), "sweep")


@pytest.mark.parametrize("name", ["config", "results", "runs"])
def test_a_folder_in_place_of_a_file_is_told_first(tmp_path, name):
    (tmp_path / f"{name}.json").mkdir()
    with pytest.raises(UserError, match=rf"{name}\.json: is a folder, where a file is written"):
        owner.check(str(tmp_path), "pretrain")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", "[" * 100_000])
def test_a_damaged_config_is_one_line(tmp_path, text):
    write(tmp_path, config=text)
    with pytest.raises(UserError, match=r"config\.json: cannot be read: ") as error:
        owner.check(str(tmp_path), "pretrain")
    assert "\n" not in str(error.value)


def test_a_run_goes_on_without_its_config(tmp_path):
    """A damaged `config.json` is to be moved away; the checkpoints have it too."""
    folder = write(tmp_path / "run", results={"method": "byol", "steps": 4})
    with pytest.raises(UserError, match="belongs to an unknown job"):
        owner.check(str(folder), "pretrain")
    (folder / "checkpoints").mkdir()
    owner.check(str(folder), "pretrain")
    with pytest.raises(UserError, match=r"belongs to a pretraining run \(byol\)"):
        owner.check(str(folder), "sweep")


def contents(folder: pathlib.Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_jobs_ask_before_they_load_anything(tmp_path):
    """No data set and no checkpoint is there: an owner is the first thing to be told."""
    folder = write(tmp_path / "workdir", **OWNERS["a sweep (it has a runs.json)"])
    before = contents(folder)
    config = tiny_runs.tiny_config(tmp_path / "no data")
    with pytest.raises(UserError, match="belongs to a sweep"):
        pretrain.pretrain(config, str(folder), tiny_runs.build)
    for follow in (False, True):
        (tmp_path / "run").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="belongs to a sweep"):
            tiny_jobs.run_job("knn", tmp_path / "run", folder, follow=follow)
    assert contents(folder) == before
    folder = write(tmp_path / "other", **OWNERS["a pretraining run (byol)"])
    with pytest.raises(UserError, match="belongs to a pretraining run"):
        sweep.run(ConfigDict(), str(folder))


def test_results_without_checkpoints_are_kept_from_another_run(tmp_path):
    """A run whose checkpoints were removed is finished all the same."""
    run = {"seed": 0, "batch_size": 16, "log_every_steps": 5}
    owner.check_unfinished(identity.flat(run), str(tmp_path))
    write(tmp_path, config=run)
    owner.check_unfinished(identity.flat(run | {"seed": 1}), str(tmp_path))  # it had saved nothing
    write(tmp_path, results={"knn_top1": 0.5})
    owner.check_unfinished(identity.flat(run | {"log_every_steps": 9}), str(tmp_path))
    with pytest.raises(UserError, match=r"config\.seed=1: the finished run there has 0; use"):
        owner.check_unfinished(identity.flat(run | {"seed": 1}), str(tmp_path))


def test_a_report_replaces_only_a_report(tmp_path):
    run = write(tmp_path / "run", config=RUN)
    out = tmp_path / "page.html"
    page.write([str(run)], str(out))
    page.write([str(run)], str(out))
    config = (run / "config.json").read_bytes()
    for path in (run / "config.json", run):
        with pytest.raises(UserError, match=f"^--output={path}: ") as error:
            page.write([str(run)], str(path))
        assert "\n" not in str(error.value)
    assert (run / "config.json").read_bytes() == config


def test_an_export_replaces_only_an_export(tmp_path):
    frozen = encoder.FrozenEncoder({"params": {"w": np.ones(2)}}, {}, "here", None, 3)
    encoder.export(frozen, str(tmp_path / "a"))
    encoder.export(frozen, str(tmp_path / "a"))
    run = write(tmp_path / "run", config=RUN)
    other = write(tmp_path / "other", encoder={"hidden": 3})
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "encoder.npz").write_bytes(b"mine")
    before = contents(tmp_path)
    named = {"run": "config.json", "other": "encoder.json", "arrays": "encoder.npz"}
    for folder, name in named.items():
        with pytest.raises(UserError, match=f"{folder}: has a {name} that is not of an export"):
            encoder.export(frozen, str(tmp_path / folder))
    assert contents(tmp_path) == before and run and other
