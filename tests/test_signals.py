"""Runs that are told to stop: what is saved, and how they go on; with real processes too."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import tiny_runs
from conftest import REPOSITORY, assert_close, assert_same, process_env

from benchmarks import compare_runs
from selfsup_jax.errors import Stopped
from selfsup_jax.run import checkpoint
from selfsup_jax.run.signals import StopSignals, stopped
from selfsup_jax.training import pretrain

PATIENCE = 600  # seconds: what takes longer hangs, on however busy a machine


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_runs.write_images(tmp_path_factory.mktemp("images"), 3, 60)


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


@pytest.mark.slow
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
def start(images):
    """`start(workdir, ...)`: a process that runs, or goes on with, the one run of these tests."""

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
            *(f"--workdir={workdir}", "--compilation_cache="),
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


@pytest.mark.slow
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
        assert f"resuming from step {saved}" in to_the_end(child)

    undisturbed = request.getfixturevalue("undisturbed")  # which ran beside this one
    assert_same(state_of(workdir), state_of(undisturbed))
    assert tiny_runs.metrics_text(workdir) == tiny_runs.metrics_text(undisturbed)
    for name in ("config.json", f"checkpoints/{STEPS}/meta/metadata"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert [line["step"] for line in tiny_runs.recorded(workdir)] == [*range(3, STEPS, 3), STEPS]
    assert results_of(workdir) == results_of(undisturbed)


@pytest.mark.slow
def test_dino_is_killed_while_a_checkpoint_is_written(images, tmp_path):
    """By SIGKILL, or just after it: student, teacher, centre and optimizer end as undisturbed."""
    steps, top = 40, tmp_path / "runs"
    groups = [f"views.{group}" for group in ("global.view_1", "global.view_2", "local.view_1")]
    flags = tiny_runs.fields(images, steps=steps, log_every_steps=1, checkpoint_every_steps=3)
    flags = {name: value for name, value in flags.items() if not name.startswith("views.")}
    flags |= {f"{view}.{name}_prob": 0.0 for view in groups for name in ("jitter", "blur")}
    flags |= {"views.local.count": 2, "views.local.size": 4, "encoder.name": "vit_ti4"}
    flags |= {"encoder.vit.depth": 1, "encoder.vit.width": 8, "encoder.vit.heads": 2}
    flags |= {"projector.hidden_sizes": (8, 8), "projector.output_size": 4, "prototypes": 16}
    flags |= {"encoder.vit.drop_path": 0.5, "keep_checkpoints": 9}

    def start(name, **options):
        command = [
            *(sys.executable, "tests/tiny_process.py", "--config=configs/dino.py:folder"),
            *(f"--workdir={top / name}", f"--compilation_cache={tmp_path / 'cache'}"),
            *(f"--config.{field}={value}" for field, value in flags.items()),
        ]
        piped = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        return process(command, devices=1, **piped, **options)

    with start("whole") as child:
        to_the_end(child)
    delay = random.uniform(0.0, 0.03)  # a checkpoint takes about as long
    with start("killed", pause=0.05) as child:
        last_shown(child)
        folder, unfinished = top / "killed", "*.orbax-checkpoint-tmp*"  # Orbax's name for it
        while not (
            tiny_runs.saved_steps(folder) and any((folder / "checkpoints").glob(unfinished))
        ):
            assert child.poll() is None, "ended before"
        time.sleep(delay)
        child.kill()
        assert child.wait(PATIENCE) == -signal.SIGKILL
    saved = tiny_runs.saved_steps(top / "killed")[-1]
    assert 3 <= saved < steps
    with start("killed") as child:
        assert f"resuming from step {saved}" in to_the_end(child)

    runs = [top / "whole", top / "killed"]
    count, wrong = compare_runs.arrays(runs, steps)
    assert count > 60 and not wrong, (delay, wrong)
    assert compare_runs.lines(runs, "metrics.jsonl") == (steps, []), delay


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(start, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    first = STEPS - 50
    for step in tiny_runs.saved_steps(workdir):
        if step > first:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    with start(workdir, devices=1) as child:
        assert f"resuming from step {first}" in to_the_end(child)
    assert results_of(workdir)["device_count"] == 1

    here, there = state_of(workdir), state_of(undisturbed)
    assert here.step == STEPS
    assert_close(here, there, relative=1e-4)  # 50 steps let the rounding grow
    lines, others = tiny_runs.recorded(workdir), tiny_runs.recorded(undisturbed)
    kept = sum(line["step"] <= first for line in lines)
    assert lines[:kept] == others[:kept]
    assert lines != others  # else nothing was computed another way
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys() and line["step"] == other["step"]
        for name, value in line.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
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
