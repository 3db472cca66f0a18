"""Checkpoints whose files are not what was written."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import sys

import numpy as np
import pytest
import tiny_runs
from conftest import assert_same

from selfsup_jax import verify
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.run import checkpoint, checkpoint_files, workdir
from selfsup_jax.training import pretrain


def save(checkpoints, state, step):
    state = parallel.replicate(lambda s: s, state.replace(step=np.int32(step)))
    checkpoints.take(state, {"config": {"seed": 0}, "data_info": {}})
    checkpoints.write()
    checkpoints.wait()


@pytest.fixture(scope="module")
def saved(initial_state, tmp_path_factory) -> pathlib.Path:
    """A workdir with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoint.Checkpoints(str(folder), keep=2)
    save(checkpoints, initial_state, 1)
    save(checkpoints, initial_state, 2)
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")


def flip(path: pathlib.Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def edit_meta(folder: pathlib.Path, change) -> None:
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_a_flipped_bit_changes_no_array_silently(saved, copied):
    """The chunks of a state are stored as they are: without checksums most of these are unseen."""
    folder, pristine = copied / "checkpoints" / "2", saved / "checkpoints" / "2"
    _, expected = checkpoint_files.read(str(pristine))
    chunks = [path for path in folder.rglob("d/*") if path.is_file()]
    rng, told = random.Random(0), 0
    for _ in range(60):
        path = rng.choice(chunks)
        flip(path, rng.randrange(8 * path.stat().st_size))
        try:
            assert_same(checkpoint_files.read(str(folder))[1], expected)
        except checkpoint_files.Damaged as e:
            told += 1
            assert str(e).startswith(f"the checkpoint {folder} ") and "\n" not in str(e)
        shutil.copyfile(pristine / path.relative_to(folder), path)
    assert told


def test_an_array_other_than_the_saved_one_is_named(initial_state, copied, monkeypatch):
    folder = str(copied / "checkpoints" / "2")
    real = checkpoint_files._of_array
    flipped = lambda array: real(array) ^ (array.ndim == 4)  # noqa: E731
    monkeypatch.setattr(checkpoint_files, "_of_array", flipped)
    with pytest.raises(checkpoint_files.Damaged) as error:
        checkpoint_files.read(folder)
    assert str(error.value) == (
        f"the checkpoint {folder} is damaged: online_params/encoder/conv/kernel does not match its "
        "checksum"
    )
    # And one that is not read is not judged.
    checkpoint_files.read(folder, lambda name: name.startswith("online_stats/"))


@pytest.mark.parametrize("what", ["moved", "deleted", "checkpoints deleted", "replaced"])
def test_a_workdir_that_goes_in_mid_run_is_told_and_nothing_is_lost(initial_state, tmp_path, what):
    folder, there = tmp_path / "run", tmp_path / "run"
    with workdir.locked(str(folder)):
        checkpoints = checkpoint.Checkpoints(str(folder))
        save(checkpoints, initial_state, 1)
        if "deleted" in what:
            shutil.rmtree(folder / ("checkpoints" if "checkpoints" in what else ""))
        else:
            folder.rename(tmp_path / "moved")
        if what == "replaced":  # by another run, with whose files nothing is mixed
            folder.mkdir()
            (folder / ".lock").write_text("1")
        if what in ("replaced", "checkpoints deleted"):
            there = tmp_path / "run.step_2"
        with pytest.raises(UserError) as error:
            save(checkpoints, initial_state, 2)
        checkpoints.close()
    assert str(error.value) == (
        f"--workdir={folder}: was moved or deleted while the run was going on; step 2 is saved in "
        f"{there}: the same command with --workdir={there} goes on"
    )
    assert checkpoint_files.steps(str(there)) == [2]
    kept = checkpoint_files.read(str(there / "checkpoints" / "2"))[1]
    assert_same(kept["step"], np.int32(2))
    assert what != "replaced" or [p.name for p in folder.iterdir()] == [".lock"]


CHANGES = {
    "a field": lambda meta: meta["config"].update(seed=1),
    "a checksum": lambda meta: meta["checksums"].update(step=["int32", [], 7]),
    "no array": lambda meta: meta["checksums"].pop("step"),
    "its own": lambda meta: meta["checksums"].update(meta=0),
    "no list": lambda meta: meta.update(checksums=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_meta_is_told(copied, change):
    folder = copied / "checkpoints" / "2"
    edit_meta(folder, CHANGES[change])
    with pytest.raises(checkpoint_files.Damaged, match="its meta does not match its checksum"):
        checkpoint_files.read(str(folder))


def test_a_shape_is_compared_before_memory_is_taken(copied, monkeypatch):
    folder = copied / "checkpoints" / "2"
    edit_meta(folder, lambda meta: meta["checksums"]["rng"].__setitem__(1, [2**40]))
    monkeypatch.setattr(checkpoint_files, "_of_meta", lambda m: m["checksums"]["meta"])
    with pytest.raises(checkpoint_files.Damaged, match=r"rng is .*\[2\]\], saved was .*1099511"):
        checkpoint_files.read(str(folder))


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(copied, initial_state, capsys):
    folder = copied / "checkpoints" / "2"
    edit_meta(folder, lambda meta: meta.pop("checksums"))
    checkpoints = checkpoint.Checkpoints(str(copied))
    assert checkpoints.latest_step == checkpoints.meta()["step"] == 2
    assert_same(checkpoints.restore(initial_state), initial_state.replace(step=np.int32(2)))
    checkpoints.close()
    lines = [line for _, line in verify.verify(str(copied))]
    assert "without checksums" in lines[1] and "whole" in lines[0]


def test_a_run_without_a_whole_checkpoint_does_not_start_again(copied):
    for step in (1, 2):
        edit_meta(copied / "checkpoints" / str(step), CHANGES["a field"])
    with pytest.raises(UserError) as error:
        checkpoint.Checkpoints(str(copied))
    assert str(error.value) == (
        f"the checkpoint {copied}/checkpoints/2 is damaged: its meta does not match its checksum; "
        f"no other one is whole: move {copied}/checkpoints away to start again"
    )


def test_another_structure_is_not_damage(copied, initial_state):
    """A checkpoint of another network stays where it is, and the run doesn't fall back."""
    params = {**initial_state.online_params, "more": {"kernel": np.zeros((2, 3), np.float32)}}
    checkpoints = checkpoint.Checkpoints(str(copied))
    with pytest.raises(UserError, match=r"2 does not fit this run: online_params/more/kernel has"):
        checkpoints.restore(initial_state.replace(online_params=params))
    checkpoints.close()


def test_an_evaluation_names_a_damaged_checkpoint_and_the_others(copied):
    folder = copied / "checkpoints" / "2"
    edit_meta(folder, CHANGES["a field"])
    with pytest.raises(checkpoint_files.Damaged) as error:
        encoder.load(str(copied))
    assert str(error.value) == (
        f"the checkpoint {folder} is damaged: its meta does not match its checksum; there are also "
        "those of steps 1"
    )


@pytest.mark.slow
def test_a_run_falls_back_and_ends_as_if_nothing_had_been(tmp_path, capfd):
    images = tiny_runs.write_images(tmp_path / "images", 3, 60)
    config = tiny_runs.tiny_config(images, steps=4, keep_every_steps=1)
    run = tmp_path / "run"
    pretrain.pretrain(config, str(run), tiny_runs.build)
    wanted, lines = tiny_runs.restore(config, run), tiny_runs.recorded(run)
    edit_meta(run / "checkpoints" / "4", lambda meta: meta["config"].update(seed=1))
    shutil.rmtree(run / "checkpoints" / "3" / "state")
    capfd.readouterr()
    pretrain.pretrain(config, str(run), tiny_runs.build)
    told = capfd.readouterr().err
    assert f"{run}/checkpoints/4 is damaged: its meta does not match its checksum; going" in told
    assert "resuming from step 2 " in told and f"are moved to {run}/damaged_checkpoints" in told
    assert_same(tiny_runs.restore(config, run), wanted)
    assert tiny_runs.recorded(run) == lines
    assert tiny_runs.saved_steps(run) == [1, 2, 3, 4]
    assert sorted(path.name for path in (run / "damaged_checkpoints").iterdir()) == ["3", "4"]


def test_the_first_checkpoint_is_read_back(initial_state, tmp_path, monkeypatch):
    """What was written without an error may still be unreadable."""
    checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=9)
    monkeypatch.setattr(checkpoint_files, "write_meta", lambda folder, meta: None)
    with pytest.raises(UserError, match=r"checkpoints/1 cannot be read: .*; use another --workdir"):
        save(checkpoints, initial_state, 1)
    checkpoints.close()


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?/b", "a\\b", "[", "a\udcff"])
def test_a_path_that_would_be_taken_for_a_pattern_is_refused(tmp_path, name):
    with (
        pytest.raises(UserError, match=r"^--workdir=.*: must "),
        workdir.locked(str(tmp_path / name)),
    ):
        pass
    assert not list(tmp_path.iterdir())
    workdir.check_path(str(tmp_path / "a]b {c} ü~#%20"))


def test_a_folder_above_is_named(tmp_path, monkeypatch):
    (tmp_path / "a[b]").mkdir()
    monkeypatch.chdir(tmp_path / "a[b]")
    with pytest.raises(UserError) as error:
        workdir.check_path("run")
    assert str(error.value) == (
        f"--workdir=run (it is {tmp_path}/a[b]/run): must not contain [, also not in the folders "
        "above: checkpoints cannot be written there; use another name"
    )


def test_verify_has_a_line_for_each_checkpoint(copied, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verify", str(copied.parent)])
    assert verify.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{copied}/checkpoints/{step}", "whole"] for step in (1, 2)
    ]
    edit_meta(copied / "checkpoints" / "1", CHANGES["a field"])
    assert verify.main() == 1
    assert "checkpoints/1 is damaged: its meta" in capsys.readouterr().out.splitlines()[0]
    shutil.rmtree(copied)
    assert verify.main() == 2
    assert capsys.readouterr().err == f"error: {copied.parent}: holds no checkpoint\n"
