"""Workdirs and data in a bucket: fsspec's memory in place of one, then Google's interface.

What needs gcsfs runs against `fake_bucket`, with the real gcsfs, Orbax and TensorStore.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from typing import ClassVar

import fake_bucket
import fsspec
import numpy as np
import pytest
import tiny_jobs
import tiny_runs
from conftest import REPOSITORY, process_env
from fsspec.implementations.memory import MemoryFileSystem

from selfsup_jax import paths, verify
from selfsup_jax.data import records, sources
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.run import checkpoint_files, events, files, lock, metrics, signals, workdir
from selfsup_jax.training import pretrain
from selfsup_jax.viz.report import page

RUN = "gs://bucket/runs/a"


class Memory(MemoryFileSystem):
    """Buckets in memory: as gcsfs, without folders of their own."""

    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    guard = threading.Lock()

    def pipe_file(self, path, value, mode="overwrite", **_):
        with self.guard:
            super().pipe_file(path, value, mode=mode)


@pytest.fixture
def memory(monkeypatch):
    """fsspec's memory in place of gcsfs: address -> content."""
    Memory.store.clear()
    Memory.store["/bucket/other"] = MemoryFileSystem().open("/x", "wb")
    monkeypatch.setattr(paths, "_gcsfs", Memory)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: name == "gcsfs" or found(name, *a)
    )
    return Memory()


def content(address: str) -> bytes:
    with paths.open(address, "rb") as f:
        return f.read()


# --------------------------------------------------------------------------------- files


def test_a_file_is_put_as_a_whole_or_not_at_all(memory):
    path = f"{RUN}/a.json"
    files.write_json(path, {"b": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"b": object()})
    assert files.read_json(path) == {"b": 1} and paths.listdir(RUN) == ["a.json"]
    with pytest.raises(RuntimeError), files.whole_file(f"{RUN}/b", "wb") as f:
        f.write(b"half")
        raise RuntimeError
    assert not paths.exists(f"{RUN}/b") and paths.exists(RUN) and paths.isdir(RUN)
    with pytest.raises(UserError, match=f"{RUN}/b: cannot be read"):
        files.read_json(f"{RUN}/b")


def test_a_file_that_grows_is_there_after_each_sync(memory):
    f = files.growing(f"{RUN}/log", b"1\n")
    f.write(b"2\n")
    assert not paths.exists(f"{RUN}/log")
    files.sync(f)
    assert content(f"{RUN}/log") == b"1\n2\n"
    f.write(b"3\n")
    f.close()
    assert content(f"{RUN}/log") == b"1\n2\n3\n"


def test_folders_are_seen_by_the_names_in_them(memory, tmp_path):
    for name in ("a", "b/c.png", "b/d/e.png"):
        paths.put(f"{RUN}/{name}", name.encode())
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for root in (RUN, str(tmp_path)):
        walked = {folder.removeprefix(root): (sorted(d), f) for folder, d, f in paths.walk(root)}
        assert walked == {"": (["b"], ["a"]), "/b": (["d"], ["c.png"]), "/b/d": ([], ["e.png"])}
        assert paths.glob(root, "b/*.png") == [f"{root}/b/c.png"]
        assert sorted(paths.listdir(root)) == ["a", "b"] and paths.getsize(f"{root}/a") == 1
        with paths.local_copy(f"{root}/b") as copy:
            assert (pathlib.Path(copy) / "d" / "e.png").read_text() == "b/d/e.png"
        assert os.path.exists(copy) == (root == str(tmp_path))
        paths.move(f"{root}/b", f"{root}/aside")
        assert not paths.exists(f"{root}/b") and paths.exists(f"{root}/aside/d/e.png")
        paths.rmtree(f"{root}/aside")
        assert paths.listdir(root) == ["a"] and list(paths.walk(f"{root}/none")) == []
    assert paths.absolute("gs://bucket//runs/a/") == RUN


def test_metrics_and_events_are_those_of_a_disk(memory, tmp_path):
    """Also after a process that was killed after its last checkpoint, of step 2."""
    for folder in (RUN, str(tmp_path)):
        killed = metrics.Recorder(folder, 0)
        for step in (1, 2, 3):
            killed.write(step, {"loss": 1 / step}, {"images_per_second": 1.0})
            if step == 2:
                killed.flush()
        if folder != RUN:
            killed.close()
        resumed = metrics.Recorder(folder, 2)
        resumed.write(3, {"loss": 0.5}, {})
        resumed.close()
    path = f"{RUN}/{metrics.FILE}"
    assert tiny_runs.without_time(content(path)) == tiny_runs.metrics_text(tmp_path)
    assert metrics.read_history(RUN) == {"loss": ([1, 2, 3], [1.0, 0.5, 0.5])}
    told = []
    for event_file in sorted(paths.glob(RUN, events.PATTERN)):
        told += [step for _, step in events._records(content(event_file)) if step]
    assert told == [1, 2, 3]


# --------------------------------------------------------------------------------- the lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock.Timing, "renew", 0.05)


def numbers() -> list[str]:
    return sorted(paths.listdir(f"{RUN}/.lock"))


def test_a_second_run_is_refused_and_names_the_first(memory, quick, capsys):
    own = rf"process {os.getpid()} on {socket.gethostname()} is running there; wait for it"
    with lock.held(RUN):
        for _ in range(2):
            with (
                pytest.raises(UserError, match=f"^--workdir={RUN}: {own}"),
                workdir.locked(RUN),
            ):
                raise AssertionError
        assert numbers() == ["00000001"]
    with lock.held(RUN):  # the number that ended is not used again
        assert numbers() == ["00000002"]


def test_the_lock_of_a_dead_holder_is_taken_over(memory, quick, monkeypatch, capsys):
    monkeypatch.setattr(lock.Timing, "expire", 0.5)
    dead = {"process": 7, "host": "gone", "renewals": 3, "ended": False}
    paths.put(f"{RUN}/.lock/00000004", json.dumps(dead).encode())
    with lock.held(RUN):
        assert numbers() == ["00000005"]
    told = capsys.readouterr().err
    assert "process 7 on gone holds it; if that gives no sign of life for 0.5 seconds" in told
    assert f"process 7 on gone has died: this one takes {RUN} over" in told


def test_a_holder_that_slept_learns_that_it_lost_its_lock(memory, quick):
    lost = threading.Event()
    told = []
    with lock._ObjectLock(RUN, lambda line: (told.append(line), lost.set())):
        paths.put(f"{RUN}/.lock/00000002", b"{}")
        assert lost.wait(60)
    assert f"--workdir={RUN}: another process has taken it over" in told[0]


@pytest.mark.parametrize("there", [None, b'{"ended": true}'])
def test_of_many_that_start_at_once_one_holds_the_lock(memory, quick, there):
    """Whether the workdir is new or its last holder has ended."""
    if there:
        paths.put(f"{RUN}/.lock/00000001", there)
    together, done = threading.Barrier(6), threading.Barrier(6)
    held = []

    def start():
        together.wait()
        with contextlib.suppress(UserError), lock.held(RUN):
            held.append(True)
            done.wait()
            return
        done.wait()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [True]


def test_a_number_that_was_used_before_is_given_back(memory, quick):
    """Of one that has looked, slept, and creates a number which two others used meanwhile."""
    paths.put(f"{RUN}/.lock/00000003", b'{"process": 9, "host": "later"}')
    slow = lock._ObjectLock(RUN)
    looked = [1]  # what it had found before it slept
    newest, slow._last = slow._last, lambda: looked.pop() if looked else newest()
    with pytest.raises(UserError, match="process 9 on later is running there"), slow:
        raise AssertionError
    assert numbers() == ["00000003"]


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://bucket/run", "must be a path, or gs://BUCKET/FOLDER"),
        ("gs://bucket", "must be a path, or gs://BUCKET/FOLDER"),
        ("gs://", "must be a path, or gs://BUCKET/FOLDER"),
        ("gs://nowhere/run", "there is no bucket nowhere"),
        ("gs://bucket/run[1]", r"must not contain \["),
    ],
)
def test_an_address_that_cannot_be_used_is_named_first(memory, tmp_path, address, told):
    config = tiny_runs.tiny_config(tmp_path / "no images")
    with pytest.raises(UserError, match=f"^--workdir={address.replace('[', '.')}.*{told}"):
        pretrain.pretrain(config, address, tiny_runs.build)
    assert not (pathlib.Path.cwd() / address.partition("/")[0]).exists()


def test_a_package_that_is_missing_and_denied_access_are_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--workdir={RUN}: to use a bucket, pip install gcsfs$"):
        workdir.check_path(RUN)

    class Denied:
        def exists(self, name):
            raise OSError("Forbidden: https://storage\nAnonymous caller has no access")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(paths, "_gcsfs", Denied)
    with pytest.raises(UserError, match=r"access is denied .*; gcloud auth application-def") as e:
        workdir.check_path(RUN)
    assert "\n" not in str(e.value)


def test_an_error_of_the_bucket_is_one_line_with_the_last_checkpoint(memory):
    def fail(error):
        with files.disk_errors(RUN, lambda: 12):
            raise error

    theirs = [
        paths.BucketError(5, "the bucket is gone", f"{RUN}/metrics.jsonl"),
        ValueError("UNAVAILABLE: http://storage/upload/storage/v1/b/bucket/o: reset"),
    ]
    for error in theirs:
        with pytest.raises(UserError, match=rf"^--workdir={RUN}: .*checkpoint is of step 12$"):
            fail(error)
    for error in (ValueError("a bug"), FileNotFoundError(2, "No such file", "images/cat.png")):
        with pytest.raises(type(error)) as raised:
            fail(error)
        assert raised.value is error


# --------------------------------------------------------------------------------- data


def test_records_are_found_and_read_in_a_bucket(memory):
    contents = [[bytes([i, n] * n) for n in range(1, 5)] for i in range(2)]
    for i, each in enumerate(contents):
        whole = (len(x).to_bytes(8, "little") + b"sums" + x + b"sums" for x in each)
        paths.put(f"gs://bucket/data/{i}", b"".join(whole))
    addresses = tuple(f"gs://bucket/data/{i}" for i in range(2))
    records.check_files(addresses)
    places = records.places(addresses, [4, 4], keep=False)
    order = [7, 0, 3, 4]
    assert records.Files(addresses)(places[order]) == [contents[i // 4][i % 4] for i in order]
    with pytest.raises(UserError, match=r"gs://bucket/data/2 is not there"):
        records.check_files([*addresses, "gs://bucket/data/2"])


def test_arrays_come_to_the_disk_and_folders_of_images_do_not(memory, tmp_path):
    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    np.savez(tmp_path / "a.npz", train_images=images)
    paths.put("gs://bucket/data/a.npz", (tmp_path / "a.npz").read_bytes())
    np.save(tmp_path / "train_images.npy", images)
    paths.put("gs://bucket/data/b/train_images.npy", (tmp_path / "train_images.npy").read_bytes())
    for name in ("a.npz", "b"):
        source = sources.load("arrays", f"gs://bucket/data/{name}", "train", "data.train_split")
        assert np.array_equal(source.images, images)
    with pytest.raises(UserError, match=r"data.dir='gs://bucket/data/c': cannot be read"):
        sources.load("arrays", "gs://bucket/data/c", "train", "data.train_split")
    with pytest.raises(UserError, match=r"a folder of images must be on a disk: copy it there"):
        sources.load("folder", "gs://bucket/data", "train", "data.train_split")


# --------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def bucket():
    """(the content of `gs://bucket`, the address of its server)."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed")
    with pytest.MonkeyPatch.context() as patch, fake_bucket.serve("bucket") as (buckets, address):
        for name, value in fake_bucket.environment(address).items():
            patch.setenv(name, value)
        paths._gcsfs.cache_clear()
        fsspec.get_filesystem_class("gcs").clear_instance_cache()
        yield buckets, address
        paths._gcsfs.cache_clear()


@pytest.fixture
def quick_jobs(tmp_path):
    with tiny_jobs.small_encoder():
        yield tiny_jobs.write_data(tmp_path / "data")


def small_run(data: pathlib.Path, folder: str) -> dict:
    settings = {"steps": 6, "checkpoint_every_steps": 2, "log_every_steps": 1}
    config = tiny_runs.tiny_config(
        data,
        **settings,
        keep_checkpoints=3,
        monitor__diagnostics_every_steps=0,
        encoder__width=0.03,
        encoder__stem="cifar",
        projector__hidden_sizes=(8,),
        predictor__hidden_sizes=(8,),
    )
    config.encoder.depth = 2
    return pretrain.pretrain(config, folder, tiny_jobs._wander)


def arrays(folder: str, step: int) -> dict[str, bytes]:
    found = checkpoint_files.read(os.path.join(folder, "checkpoints", str(step)))[1]
    return {name: array.tobytes() for name, array in found.items()}


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk(bucket, quick_jobs, quick, tmp_path, monkeypatch):
    """Stopped and resumed, resumed after a damaged checkpoint; evaluated, verified, reported."""
    disk = str(tmp_path / "run")
    small_run(quick_jobs, disk)
    expected = arrays(disk, 6)
    with monkeypatch.context() as patch:
        patch.setattr(signals.StopSignals, "received", lambda self, step: 15 if step == 2 else None)
        with pytest.raises(Stopped, match=f"after step 2, which is saved in {RUN}"):
            small_run(quick_jobs, RUN)
    objects = bucket[0].objects["bucket"]
    for name, stored in list(objects.items()):  # a process was killed while it wrote step 4
        if "checkpoints/2/" in name and "commit_success" not in name:
            objects[name.replace("/2/", "/4/")] = stored
    small_run(quick_jobs, RUN)
    assert checkpoint_files.steps(RUN) == [2, 4, 6]
    assert arrays(RUN, 6) == expected
    metrics_there = tiny_runs.without_time(content(f"{RUN}/metrics.jsonl"))
    assert metrics_there == tiny_runs.metrics_text(tmp_path / "run")
    assert all(good for good, _ in verify.verify("gs://bucket/runs"))

    meta = "runs/a/checkpoints/6/meta/metadata"
    objects[meta] = objects[meta]._replace(content=b"{")
    told = [line for good, line in verify.verify("gs://bucket/runs") if not good]
    assert len(told) == 1 and told[0].startswith(f"the checkpoint {RUN}/checkpoints/6 cannot")
    with lock.held(RUN), pytest.raises(UserError, match=rf"process {os.getpid()} on .* running"):
        small_run(quick_jobs, RUN)
    small_run(quick_jobs, RUN)
    assert arrays(RUN, 6) == expected
    assert paths.exists(f"{RUN}/damaged_checkpoints/6/meta/metadata")

    probe = "gs://bucket/jobs/probe"
    results = tiny_jobs.run_job("linear_probe:byol", RUN, probe)
    on_disk = tiny_jobs.run_job("linear_probe:byol", disk, tmp_path / "probe")
    assert {k for k in results if results[k] != on_disk[k]} == {"checkpoint", "run"}
    assert results["run"] == RUN and files.read_json(f"{probe}/results.json") == results
    assert not paths.exists(f"{probe}/checkpoints") and paths.exists(f"{probe}/confusion.npz")
    followed = tiny_jobs.run_job("knn", RUN, "gs://bucket/jobs/knn", follow=True)
    assert paths.exists("gs://bucket/jobs/knn/step_00000004/results.json")
    (points,) = paths.glob(RUN, "evaluation/knn-*")
    assert metrics.read_history(points)["knn_top1"][0] == [2, 4, 6]
    encoder.export(encoder.load(RUN), "gs://bucket/export")
    exported = tiny_jobs.run_job("knn", "gs://bucket/export", tmp_path / "knn")
    on_disk = tiny_jobs.run_job("knn", disk, tmp_path / "2")
    assert exported["knn_top1"] == followed["knn_top1"] == on_disk["knn_top1"]

    for _ in range(2):  # the second replaces the first
        told = page.write(["gs://bucket/runs", probe], "gs://bucket/pages/report.html")
    shown = content("gs://bucket/pages/report.html").decode()
    assert "byol" in shown and "1 run, 1 evaluation job" in told


@pytest.mark.slow
def test_a_killed_process_is_followed_by_the_next(bucket, tmp_path):
    """By the command line: killed with SIGKILL between two checkpoints, its lock taken over."""
    _, address = bucket
    folder = "gs://bucket/runs/killed"
    images = tiny_runs.write_images(tmp_path / "images", 3, 60)
    fields = tiny_runs.fields(images, steps=24, checkpoint_every_steps=4, log_every_steps=1)
    command = [
        *(sys.executable, "tests/tiny_process.py", "--config=configs/byol.py:folder"),
        *(f"--workdir={folder}", f"--compilation_cache={tmp_path / 'compiled'}"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    environment = process_env(1) | fake_bucket.environment(address) | {"TINY_EXPIRE": "6"}

    def start(pause: str) -> subprocess.Popen:
        env = environment | {"TINY_PAUSE": pause}
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, stderr=subprocess.PIPE, text=True)

    first = start(pause="0.2")
    try:
        for line in first.stderr:
            if line.startswith("step ") and checkpoint_files.steps(folder):
                break
        with (
            pytest.raises(UserError, match=rf"process {first.pid} on .* is running there"),
            lock.held(folder),
        ):
            raise AssertionError
    finally:
        first.kill()
        first.communicate()
    saved = checkpoint_files.steps(folder)[-1]
    second = start(pause="0")
    _, told = second.communicate()
    assert second.returncode == 0, told
    assert f"process {first.pid} on {socket.gethostname()} has died" in told
    assert f"resuming from step {saved} in {folder}" in told
    history = metrics.read_history(folder)
    assert history["loss"][0] == list(range(1, 25)) and checkpoint_files.steps(folder)[-1] == 24
    assert all(good for good, _ in verify.verify(folder))
