"""How runs end early: what is told, what is saved, and how they go on; with real processes too."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import tiny_runs
from conftest import REPOSITORY, assert_close, assert_same, process_env

from selfsup_jax.devices import parallel
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.run import checkpoint, files, nan_guard
from selfsup_jax.run.signals import StopSignals, stopped
from selfsup_jax.training import pretrain

PATIENCE = 600  # seconds: what takes longer hangs, on however busy a machine

# --------------------------------------------------------------------- numbers that are none


def metrics_of_step(**values: float) -> dict:
    """What a step's metrics are like: replicated over the devices, not yet looked at."""
    numbers = {"loss": 1.5, "grad_norm/encoder": 0.25} | values
    finite = np.isfinite(list(numbers.values())).all()
    arrays = {name: np.float32(value) for name, value in (numbers | {"finite": finite}).items()}
    return parallel.replicate(lambda x: x, arrays)


def names_of_step(step: int) -> np.ndarray:
    return np.array([f"images/{step}_{i}.png" for i in range(4)])


def test_finite_steps_pass(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path))
    for step in range(1, 6):
        watch.add(step, metrics_of_step(), names_of_step(step))
    watch.drain()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_the_step_that_is_not_finite_is_named_though_it_is_looked_at_later(tmp_path, lag):
    watch = nan_guard.NanGuard(str(tmp_path), lag=lag)
    broken = metrics_of_step(loss=np.nan, **{"grad_norm/encoder": np.inf, "tau": 0.5})
    for step in range(1, 5):
        watch.add(step, metrics_of_step(), names_of_step(step))

    def add_later_steps():
        watch.add(5, broken, names_of_step(5))
        for step in range(6, 6 + lag):
            assert step <= 5 + lag
            watch.add(step, metrics_of_step(loss=np.nan), names_of_step(step))

    with pytest.raises(UserError) as error:
        add_later_steps()
    path = tmp_path / "non_finite.json"
    told = str(error.value)
    assert "\n" not in told and "step 5 " in told and str(path) in told
    assert "loss nan" in told and "grad_norm/encoder inf" in told and "tau" not in told
    assert "config.optimizer.learning_rate" in told
    assert json.loads(path.read_text()) == {
        "step": 5,
        "non_finite": ["grad_norm/encoder", "loss"],
        "metrics": {"loss": "nan", "grad_norm/encoder": "inf", "tau": 0.5, "finite": 0.0},
        "images": names_of_step(5).tolist(),
    }


def test_a_step_is_not_looked_at_before_its_time(tmp_path):
    """Looking would make the host wait for the device."""
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(1, metrics_of_step(loss=np.nan), names_of_step(1))
    watch.add(2, metrics_of_step(), names_of_step(2))
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="step 1 is not finite"):
        watch.add(3, metrics_of_step(), names_of_step(3))


def test_a_drain_looks_at_all_steps(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(7, metrics_of_step(), names_of_step(7))
    watch.drain()
    watch.add(8, metrics_of_step(loss=-np.inf), names_of_step(8))
    with pytest.raises(UserError, match="step 8 is not finite: loss -inf"):
        watch.drain()


# ------------------------------------------------------------------------------- signals


@pytest.fixture
def handlers():
    """Of SIGINT and SIGTERM, recognisable; what is sent to the test itself ends up here."""
    received = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    mine = {number: lambda got, frame: received.append(got) for number in numbers}
    before = {number: signal.signal(number, mine[number]) for number in numbers}
    yield types.SimpleNamespace(
        received=received,
        are_in_place=lambda: all(signal.getsignal(n) is mine[n] for n in numbers),
    )
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_between_catch_and_the_end(handlers, number):
    with StopSignals() as signals:
        assert handlers.are_in_place()
        signal.raise_signal(number)  # before there is a step to save
        assert handlers.received == [number] and signals.received(1) is None
        signals.catch()
        assert signals.received(1) is None
        signal.raise_signal(number)
        assert signals.received(2) == signals.received(3) == number
    assert handlers.received == [number]  # not passed on
    assert handlers.are_in_place()


def test_handlers_are_put_back_after_an_error_too(handlers):
    with contextlib.suppress(ZeroDivisionError), StopSignals() as signals:
        signals.catch()
        assert not handlers.are_in_place()
        raise ZeroDivisionError
    assert handlers.are_in_place()
    with StopSignals():
        pass  # ended before it had begun to catch
    assert handlers.are_in_place()


def test_a_thread_may_train_too(handlers):
    """Python takes handlers in the main thread only."""
    done = []

    def run():
        with StopSignals() as signals:
            signals.catch()
            done.append(signals.received(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [None] and handlers.are_in_place()


WAIT = """
import sys
import time
from selfsup_jax.run.signals import StopSignals
with StopSignals() as signals:
    signals.catch()
    print("ready", flush=True)
    while not signals.received(1):
        time.sleep(0.005)
    print(signals.received(1), flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once():
    pairs = [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
    with contextlib.ExitStack() as stack:
        waiting = [
            stack.enter_context(process([sys.executable, "-c", WAIT], stdout=subprocess.PIPE))
            for _ in pairs
        ]
        for (first, second), child in zip(pairs, waiting, strict=True):
            assert child.stdout.readline() == "ready\n"
            child.send_signal(first)
            assert child.stdout.readline() == f"{int(first)}\n"
            child.send_signal(second)
            assert child.wait(30) == -second


def test_a_stopped_process_tells_its_step_and_how_to_go_on():
    told = stopped(signal.SIGINT, 1234, "runs/a")
    assert told.status == 130 and stopped(signal.SIGTERM, 1, "a").status == 143
    assert "SIGINT" in str(told) and "1,234" in str(told) and "runs/a" in str(told)
    assert "\n" not in str(told)


# ---------------------------------------------------------------------------------- disks


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
    with pytest.raises(UserError, match=os.strerror(number)):
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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_runs.write_images(tmp_path_factory.mktemp("images"), 3, 60)


def test_a_full_disk_leaves_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    """Full for the metrics first, then too small for a checkpoint; in between the run goes on."""
    flush, usage = pretrain.Recorder.flush, shutil.disk_usage
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
        pretrain.pretrain(config, str(tmp_path), tiny_runs.build)

    monkeypatch.setattr(pretrain.Recorder, "flush", flush_to_a_full_disk)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match=rf"^--workdir={tmp_path}: .*No space left.* step 2$"):
        run()
    assert tiny_runs.saved_steps(tmp_path) == [2]
    with pytest.raises(UserError, match=rf"^{tmp_path}.* step 6: .*checkpoint is of step 4$"):
        run()
    assert tiny_runs.saved_steps(tmp_path) == [2, 4]
    assert len(looks) == 3 and all(str(path).startswith(str(tmp_path)) for path in looks)


def test_a_signal_while_the_last_checkpoint_is_written_stops_the_run(
    images, tmp_path, monkeypatch, handlers
):
    """Before the evaluation, which may take minutes."""
    wait = checkpoint.Checkpoints.wait

    def signalled(self):
        signal.raise_signal(signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", signalled)
    config = tiny_runs.tiny_config(images, steps=2)
    with contextlib.suppress(Stopped):
        pretrain.pretrain(config, str(tmp_path), tiny_runs.build)
    assert tiny_runs.saved_steps(tmp_path) == [2]
    assert not (tmp_path / "results.json").exists() or handlers.received


# ------------------------------------------------------------------------- real processes

STEPS = 300
DEVICES = 2


@contextlib.contextmanager
def process(command, devices: int = DEVICES, pause: float = 0.0, **popen):
    """A process that is killed on leaving the block, if it hasn't ended by then."""
    child = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=process_env(devices) | {"TINY_PAUSE": str(pause)},
        text=True,
        **popen,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.fixture(scope="module")
def start(images, tmp_path_factory):
    """`start(workdir, ...)`: a process that runs, or goes on with, the one run of these tests."""
    cache = tmp_path_factory.mktemp("compiled")

    def start_in(workdir, **options):
        flags = tiny_runs.fields(
            images,
            steps=STEPS,
            log_every_steps=3,
            checkpoint_every_steps=7,
            monitor__diagnostics_every_steps=6,
            keep_every_steps=50,
        )
        command = [
            *(sys.executable, "tests/tiny_process.py", "--config=configs/byol.py:folder"),
            *(f"--workdir={workdir}", f"--compilation_cache={cache}"),
            *(f"--config.{name}={value}" for name, value in flags.items()),
        ]
        return process(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)

    return start_in


def last_shown(child, at_least: int = 1) -> int:
    """Reads what the process prints until it shows such a step; that step."""
    for line in child.stderr:
        shown = re.match(r"step (\d+)/", line)
        if shown and int(shown[1]) >= at_least:
            return int(shown[1])
    raise AssertionError("ended before")


def to_the_end(child) -> str:
    """What the process printed, once it has ended as it should."""
    printed = child.stderr.read()
    assert child.wait(PATIENCE) == 0, printed
    return printed


@pytest.fixture(scope="module")
def begun(start, tmp_path_factory):
    """The run that nothing stops, begun: (its process, its workdir)."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with start(workdir) as child:
        yield child, workdir


@pytest.fixture(scope="module")
def undisturbed(begun):
    child, workdir = begun
    assert "going on" not in to_the_end(child)
    assert tiny_runs.saved_steps(workdir)[-1] == STEPS
    return workdir


def state_of(workdir):
    return tiny_runs.restore(tiny_runs.tiny_config(workdir), workdir)


def results_of(workdir) -> dict:
    results = json.loads((workdir / "results.json").read_text())
    del results["images_per_second"]
    return results


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_never_was(
    start, begun, request, tmp_path
):
    """SIGTERM, Ctrl-C and SIGKILL while it steps: all that is left is the same, bit for bit."""
    workdir, saved = tmp_path / "run", 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, None)):
        with start(workdir, pause=0.02) as child:
            shown = last_shown(child, at_least=saved + 20)
            while tiny_runs.saved_steps(workdir)[-1:] in ([], [saved]):  # a slow disk
                shown = last_shown(child)
            child.send_signal(number)
            printed = child.stderr.read()
            ended = child.wait(PATIENCE)
        before, saved = saved, (tiny_runs.saved_steps(workdir) or [0])[-1]
        recorded = tiny_runs.recorded(workdir) if status else []
        if status:
            assert ended == status, printed
            *_, told = printed.splitlines()
            assert f"stopped after step {saved}," in told and str(workdir) in told
            # It is the step that was done last: what it had to record is there, and no more.
            assert saved >= shown and saved - saved % 3 == recorded[-1]["step"]
        else:
            assert ended == -number
            assert before < saved < STEPS
        assert not (workdir / "results.json").exists()
    with start(workdir) as child:
        assert f"going on from step {saved}" in to_the_end(child)

    undisturbed = request.getfixturevalue("undisturbed")  # which ran beside this one
    assert_same(state_of(workdir), state_of(undisturbed))
    for name in ("metrics.jsonl", "config.json", f"checkpoints/{STEPS}/meta/metadata"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert [line["step"] for line in tiny_runs.recorded(workdir)] == [*range(3, STEPS, 3), STEPS]
    assert results_of(workdir) == results_of(undisturbed)


def test_a_run_goes_on_with_another_number_of_devices(start, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    first = STEPS - 50
    for step in tiny_runs.saved_steps(workdir):
        if step > first:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    with start(workdir, devices=1) as child:
        assert f"going on from step {first}" in to_the_end(child)
    assert results_of(workdir)["device_count"] == 1

    here, there = state_of(workdir), state_of(undisturbed)
    assert here.step == STEPS
    assert_close(here, there)
    lines, others = tiny_runs.recorded(workdir), tiny_runs.recorded(undisturbed)
    kept = sum(line["step"] <= first for line in lines)
    assert lines[:kept] == others[:kept]
    assert lines != others  # else nothing was computed another way
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys() and line["step"] == other["step"]
        for name, value in line.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_workdir_that_cannot_be_is_told_before_anything_is_compiled(tmp_path):
    """By `run_experiment.py` itself: its large networks would take a minute."""
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run"
    command = [
        *(sys.executable, "run_experiment.py", "--config=configs/byol.py:demo"),
        *(f"--workdir={workdir}", "--compilation_cache="),
    ]
    with process(command, devices=1, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        out, told = child.communicate(timeout=PATIENCE)
    assert child.returncode == 2
    assert not out and len(told.splitlines()) == 1
    assert told.startswith(f"error: --workdir={workdir}: ") and "Not a directory" in told
    assert (tmp_path / "file").read_text() == ""
