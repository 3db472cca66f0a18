"""Files that are whole or not there, and what a disk does to a run, told in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import tiny_runs

from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.run import files
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.training import pretrain


def fail_with(error: BaseException, saved: int | None = 12) -> None:
    with files.disk_errors("runs/a", lambda: saved):
        raise error


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES]
)
def test_what_the_disk_does_is_told_in_one_line(number):
    error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
    with pytest.raises(UserError) as told:
        fail_with(error)
    assert told.value.__cause__ is error
    for part in ("--workdir=runs/a", os.strerror(number), "step 12"):
        assert part in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="no checkpoint"):
        fail_with(error, saved=None)


def test_a_full_disk_is_recognised_within_other_errors():
    full = os.strerror(errno.ENOSPC)
    for path in (os.path.abspath("runs/a/checkpoints/5"), "runs/a/events"):
        with pytest.raises(UserError, match=full):
            fail_with(ValueError(f"RESOURCE_EXHAUSTED: writing {path}: {full} [source ...]\n"))
    with pytest.raises(ValueError, match="shm"):  # not the workdir's disk
        fail_with(ValueError(f"Error while creating /dev/shm/nccl-1: {full}"))
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, full)
    with pytest.raises(UserError, match=full):
        fail_with(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("a"),
        OSError("without a number"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        UserError("config.a=1: must not be"),
        Stopped("stopped", 143),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised:
        fail_with(error)
    assert raised.value is error


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
@pytest.mark.parametrize("path", ["images/cat.png", "runs/b/config.json", "/etc/a"])
def test_files_elsewhere_are_not_the_workdirs(number, path):
    error = OSError(number, os.strerror(number), path)
    with pytest.raises(OSError) as raised:
        fail_with(error)
    assert raised.value is error
    inside = OSError(number, os.strerror(number), os.path.abspath("runs/a/plots/b.png"))
    told = "was moved or deleted" if number == errno.ENOENT else os.strerror(number)
    with pytest.raises(UserError, match=told):
        fail_with(inside)


def test_a_neighbour_whose_name_begins_like_the_workdirs_is_elsewhere():
    with pytest.raises(FileNotFoundError):
        fail_with(OSError(errno.ENOENT, os.strerror(errno.ENOENT), "runs/a_images/cat.png"))


def test_a_mistake_is_told_as_such_though_a_disk_error_came_before():
    with pytest.raises(UserError, match=r"config\.a=1"):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            with files.disk_errors("runs/a", lambda: 12):
                raise UserError("config.a=1: must not be") from e


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(str(path), {"b": 1, "a": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": 1}
    assert path.read_text().endswith("}\n")
    assert os.listdir(tmp_path) == ["a.json"]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        files.write_json(str(path), {"a": 1, "b": object()})
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Full for the metrics first, then too small for a checkpoint; in between the run goes on."""
    images = tiny_runs.write_images(tmp_path / "images", 3, 60)
    workdir = tmp_path / "run"
    flush, usage = Recorder.flush, shutil.disk_usage
    flushed, looks = [], []

    def flush_to_a_full_disk(self):
        flushed.append(True)
        if len(flushed) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(self)

    def disk_usage(path):
        looks.append(path)
        return usage(path)._replace(free=10**9 if len(looks) < 3 else 10)

    def run():
        settings = {"steps": 8, "checkpoint_every_steps": 2, "keep_every_steps": 2}
        config = tiny_runs.tiny_config(images, **settings)
        pretrain.pretrain(config, str(workdir), tiny_runs.build)

    monkeypatch.setattr(Recorder, "flush", flush_to_a_full_disk)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match=rf"^--workdir={workdir}: .*No space left.* step 2$"):
        run()
    assert tiny_runs.saved_steps(workdir) == [2]
    with pytest.raises(UserError, match=rf"^{workdir}.* step 6: .*checkpoint is of step 4$"):
        run()
    assert tiny_runs.saved_steps(workdir) == [2, 4]
    assert len(looks) == 3 and all(str(path).startswith(str(workdir)) for path in looks)
