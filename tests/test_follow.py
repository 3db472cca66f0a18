"""Watch mode: each checkpoint of a run that is going on is evaluated once, until the run ends."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import types

import numpy as np
import pytest
import tiny_jobs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_jobs import Killed, add_checkpoint, copy_run, make_config, read

from selfsup_jax import jobs
from selfsup_jax.data import inputs
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.jobs import follow, runner


@pytest.fixture(scope="module", autouse=True)
def one_block():
    with tiny_jobs.small_encoder():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, whose checkpoints the tests let appear one by one."""
    data = tiny_jobs.write_data(tmp_path_factory.mktemp("data"))
    return tiny_jobs.make_run(data, tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture
def going_on(run, tmp_path):
    """The run when it had made its first step."""
    workdir = copy_run(run, tmp_path / "run", 1)
    shutil.copy(run / "config.json", workdir)
    return workdir


def write_results(workdir: pathlib.Path, steps: int, newer: float = 10.0) -> None:
    """The run's end, so many seconds after its process began."""
    (workdir / "results.json").write_text(json.dumps({"steps": steps}))
    began = os.path.getmtime(workdir / "config.json")
    os.utime(workdir / "results.json", (began + newer,) * 2)


class Clock:
    """Stands in for `time`: each sleep takes an hour, and lets the next thing happen."""

    def __init__(self):
        self.now, self.slept, self.events = 0.0, [], iter(())

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += 3600
        self.slept.append(seconds)
        event = next(self.events, None)
        assert event is not None, "it waits for ever"
        event()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    time = types.SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(follow, "time", time)
    return clock


@pytest.fixture
def evaluated(monkeypatch):
    """The steps that are evaluated from here on, an untrained encoder as -1."""
    found = []
    prepare = runner.EvalJob.__new__

    def spy(cls, task, *args):
        def counted(frozen, folder):
            found.append(-1 if "random_init" in folder else frozen.step)
            return task(frozen, folder)

        return prepare(cls, counted, *args)

    monkeypatch.setattr(runner.EvalJob, "__new__", spy)
    return found


def follow_run(run: pathlib.Path, workdir: pathlib.Path, name: str = "knn", **changes):
    return jobs.run(make_config(name, run, follow=True, **changes), str(workdir))


def log_of(run, name):
    """Where the only watch of that name writes its points."""
    (folder,) = (run / "evaluation").glob(f"{name}-*")
    return folder


def points(folder: pathlib.Path) -> list[int]:
    """The steps in `metrics.jsonl`, which are also those of TensorBoard."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = EventAccumulator(str(folder)).Reload()
    for name in set().union(*lines) - {"step", "wall_time"}:
        events = shown.Scalars(f"accuracy/{name}")
        assert [event.step for event in events] == [line["step"] for line in lines]
        for event, line in zip(events, lines, strict=True):
            assert event.value == pytest.approx(line[name])
    return [line["step"] for line in lines]


@pytest.mark.slow
def test_each_checkpoint_of_a_run_is_evaluated_once_until_it_ends(
    run, going_on, tmp_path, clock, evaluated
):
    half = going_on / "checkpoints" / "3.orbax-checkpoint-tmp-1"

    def begins_to_save():
        half.mkdir()

    def saves():
        half.rmdir()
        add_checkpoint(run, going_on, 3)

    clock.events = iter(
        [
            lambda: add_checkpoint(run, going_on, 2),
            begins_to_save,
            saves,
            # Of an earlier process: the run has been gone on with since.
            lambda: write_results(going_on, 3, newer=-5.0),
            lambda: write_results(going_on, 4),  # for a checkpoint that isn't to be seen yet
            lambda: add_checkpoint(run, going_on, 4),
        ]
    )
    job = tmp_path / "watched"
    results = follow_run(going_on, job, random_init=True, follow_poll_seconds=7.0)
    assert evaluated == [1, -1, 2, 3, 4]
    assert clock.slept == [7.0] * 6
    assert results == read(job / "results.json") == read(job / "step_00000004" / "results.json")
    assert results["step"] == 4
    for step in range(1, 5):
        # Each is what the job by itself comes to.
        found = read(job / f"step_{step:08d}" / "results.json")
        checkpoint = going_on / "checkpoints" / str(step)
        config = make_config("knn", checkpoint, random_init=True)
        assert jobs.run(config, str(tmp_path / f"alone_{step}")) == found
        assert found["checkpoint"] == str(checkpoint)
        assert (job / f"step_{step:08d}" / "confusion.npz").exists()
    assert points(log_of(going_on, "watched")) == [1, 2, 3, 4]
    # Once more: nothing is left to be done.
    evaluated.clear()
    assert follow_run(going_on, job, random_init=True) == results
    assert not evaluated and points(log_of(going_on, "watched")) == [1, 2, 3, 4]


@pytest.fixture
def killed_watch(run, going_on, tmp_path, clock):
    """Killed while it waits, with two of the run's checkpoints evaluated."""

    def kill():
        raise Killed

    clock.events = iter([lambda: add_checkpoint(run, going_on, 2), kill])
    with pytest.raises(Killed):
        follow_run(going_on, tmp_path / "job")
    return tmp_path / "job"


def end(run, going_on, steps=(3, 4)) -> None:
    for step in steps:
        add_checkpoint(run, going_on, step)
    write_results(going_on, max(steps))


@pytest.mark.slow
def test_after_a_kill_only_what_is_left_is_evaluated(run, going_on, killed_watch, evaluated):
    assert read(killed_watch / "results.json")["step"] == 2
    end(run, going_on)
    assert follow_run(going_on, killed_watch)["step"] == 4
    assert evaluated == [3, 4]
    assert points(log_of(going_on, "job")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_removed_checkpoint_stays_evaluated(run, going_on, killed_watch, evaluated):
    """The run keeps only its newest."""
    shutil.rmtree(going_on / "checkpoints" / "1")
    shutil.rmtree(going_on / "checkpoints" / "2")
    end(run, going_on)
    assert follow_run(going_on, killed_watch)["step"] == 4
    assert evaluated == [3, 4]
    assert follow.done_steps(str(killed_watch)) == [1, 2, 3, 4]
    assert points(log_of(going_on, "job")) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("before_the_copy", [True, False])
def test_a_kill_between_a_result_and_its_point_loses_none(
    run, going_on, killed_watch, evaluated, monkeypatch, before_the_copy
):
    """The step's results are there; the point, and perhaps the newest's results, are not."""
    end(run, going_on)

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if before_the_copy:
            patch.setattr(follow, "write_json", kill)
        else:
            patch.setattr(follow._MeasureLog, "record", kill)
        with pytest.raises(Killed):
            follow_run(going_on, killed_watch)
    assert evaluated == [3]
    assert points(log_of(going_on, "job")) == [1, 2]
    assert follow_run(going_on, killed_watch)["step"] == 4
    assert evaluated == [3, 4]
    assert points(log_of(going_on, "job")) == [1, 2, 3, 4]
    assert read(killed_watch / "results.json")["step"] == 4


@pytest.mark.slow
def test_a_kill_between_the_last_result_and_its_point(
    run, going_on, killed_watch, evaluated, monkeypatch
):
    """Nothing is left to be evaluated, but the newest's results are still to be copied."""
    end(run, going_on, steps=(3,))

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(follow, "write_json", kill)
        with pytest.raises(Killed):
            follow_run(going_on, killed_watch)
    assert follow_run(going_on, killed_watch)["step"] == 3
    assert evaluated == [3] and points(log_of(going_on, "job")) == [1, 2, 3]
    assert read(killed_watch / "results.json")["step"] == 3


@pytest.mark.slow
def test_a_job_without_measures_leaves_no_points(run, going_on, tmp_path, clock):
    end(run, going_on, steps=(2,))
    for _ in range(2):
        follow_run(going_on, tmp_path / "job", "embed")
        assert points(log_of(going_on, "job")) == []
    assert (tmp_path / "job" / "step_00000002" / "features.npz").exists()


@pytest.mark.slow
def test_a_job_that_trains_goes_on_with_the_checkpoint_it_was_stopped_at(
    run, going_on, tmp_path, clock, evaluated, monkeypatch
):
    """SIGTERM in the second checkpoint's training; its workdir is where its points go, too."""
    end(run, going_on, steps=(2,))
    job = going_on / "evaluation" / "finetuned"
    train_batches, trained = inputs.train_batches, []

    def batches(*args, **kwargs):
        for batch in train_batches(*args, **kwargs):
            trained.append(batch)
            if len(trained) == 9 + 4:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(inputs, "train_batches", batches)
    with pytest.raises(Stopped, match=r"after step 4,.*step_00000002"):
        follow_run(going_on, job, "finetune:100pct", steps=9)
    assert points(log_of(going_on, "finetuned")) == [1]
    results = follow_run(going_on, job, "finetune:100pct", steps=9)
    assert results["step"] == 2 and evaluated == [1, 2, 2] and len(trained) == 18
    assert points(log_of(going_on, "finetuned")) == [1, 2]
    alone = make_config("finetune:100pct", going_on, steps=9)
    assert jobs.run(alone, str(tmp_path / "alone")) == results


@pytest.mark.slow
def test_a_checkpoint_that_is_removed_while_it_is_read_is_left_out(
    run, going_on, tmp_path, evaluated, monkeypatch, clock
):
    end(run, going_on, steps=(2, 3))
    load = encoder.load

    def removed(path, step=None):
        if step == 2:
            shutil.rmtree(going_on / "checkpoints" / "2")
        return load(path, step)

    monkeypatch.setattr(encoder, "load", removed)
    assert follow_run(going_on, tmp_path / "job")["step"] == 3
    assert evaluated == [1, 3]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_left_out(
    run, going_on, tmp_path, clock, evaluated, capsys
):
    """Others come after it; a run of which none is whole is an error."""
    for path in (going_on / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    clock.events = iter([lambda: None, lambda: end(run, going_on, steps=(2,))])
    assert follow_run(going_on, tmp_path / "job")["step"] == 2
    assert evaluated == [2]
    told = capsys.readouterr().err
    assert "checkpoints/1 cannot be read" in told and "; it is left out" in told
    assert "its 1 checkpoints are evaluated; not that of step 1" in told
    shutil.rmtree(going_on / "checkpoints" / "2")
    write_results(going_on, 1)
    clock.events = iter([lambda: None])
    with pytest.raises(UserError, match=r"config\.checkpoint=.*: none of its checkpoints is whole"):
        follow_run(going_on, tmp_path / "other")


@pytest.mark.slow
def test_a_checkpoint_on_its_way_out_is_left_out(run, going_on, tmp_path, clock, evaluated):
    for path in (going_on / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    end(run, going_on, steps=(2,))
    clock.events = iter([lambda: shutil.rmtree(going_on / "checkpoints" / "1")])
    assert follow_run(going_on, tmp_path / "job")["step"] == 2
    assert evaluated == [2]


@pytest.mark.slow
def test_another_job_in_a_watchs_workdir_is_refused(run, going_on, killed_watch, evaluated):
    end(run, going_on)
    with pytest.raises(UserError, match=r"config\.neighbours=\[3\]: the job there has \[5\]"):
        follow_run(going_on, killed_watch, neighbours=(3,))
    with pytest.raises(UserError, match=r"data_info\.run="):
        follow_run(run, killed_watch)
    assert not evaluated
    # How often it looks, and how long it waits, is no matter.
    follow_run(going_on, killed_watch, follow_poll_seconds=1.0, follow_patience_hours=1.0)


@pytest.mark.slow
def test_a_mended_command_may_go_to_the_same_workdir(run, going_on, tmp_path, clock):
    end(run, going_on, steps=(2,))
    with pytest.raises(UserError, match="neighbours"):
        follow_run(going_on, tmp_path / "job", neighbours=(200,))
    assert follow_run(going_on, tmp_path / "job", neighbours=(20,))["knn_k"] == 20


@pytest.mark.slow
def test_patience_ends_and_begins_anew_with_each_checkpoint(run, going_on, tmp_path, clock):
    """An hour for each look: five hours after the last checkpoint is above four."""
    wait = [lambda: None]
    clock.events = iter(wait * 3 + [lambda: add_checkpoint(run, going_on, 2)] + wait * 9)
    with pytest.raises(UserError, match=r"config\.follow_patience_hours=4: no new checkpoint"):
        follow_run(going_on, tmp_path / "job", follow_patience_hours=4.0)
    assert len(clock.slept) == 4 + 5
    assert follow.done_steps(str(tmp_path / "job")) == [1, 2]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_yet_is_waited_for(run, going_on, tmp_path, clock):
    shutil.rmtree(going_on / "checkpoints")
    clock.events = iter([lambda: end(run, going_on, steps=(1,))])
    assert follow_run(going_on, tmp_path / "job")["step"] == 1


@pytest.mark.slow
def test_what_is_no_run_cannot_be_watched(run, going_on, tmp_path, clock):
    encoder.export(encoder.load(str(run)), str(tmp_path / "exported"))
    for path in (
        "",
        tmp_path / "nowhere",
        tmp_path / "exported",
        run / "checkpoints",
        run / "checkpoints" / "1",
    ):
        with pytest.raises(UserError, match=r"checkpoint=.*: must be a run's workdir, to follow"):
            follow_run(path, tmp_path / "job")


@pytest.mark.parametrize(
    ("steps", "saved", "newer", "ended"),
    [
        (4, (2, 4), 10.0, True),
        (4, (4, 6), 10.0, True),  # a run that had been longer
        (4, (2, 3), 10.0, False),  # the last checkpoint isn't there yet
        (4, (2, 4), -10.0, False),  # gone on with since
        (4, (), 10.0, False),
        (None, (2, 4), 0.0, False),  # no results
    ],
)
def test_when_a_run_has_ended(tmp_path, steps, saved, newer, ended):
    (tmp_path / "config.json").write_text("{}")
    for step in saved:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    if steps:
        write_results(tmp_path, steps, newer)
    assert encoder.checkpoint_steps(str(tmp_path)) == list(saved)
    assert follow.has_ended(str(tmp_path)) is ended


@pytest.mark.slow
def test_a_run_that_may_not_be_written_to_has_its_points_beside_the_results(
    run, going_on, tmp_path, clock
):
    (going_on / "evaluation").write_text("")  # no folder can be made there, even by root
    end(run, going_on, steps=(2,))
    follow_run(going_on, tmp_path / "job")
    assert points(tmp_path / "job") == [1, 2]


@pytest.mark.slow
def test_two_watches_of_one_name_keep_their_points_apart(run, going_on, tmp_path, clock):
    end(run, going_on, steps=(2,))
    for parent in ("a", "b"):
        follow_run(going_on, tmp_path / parent / "same")
    logs = sorted((going_on / "evaluation").glob("same-*"))
    assert [points(log) for log in logs] == [[1, 2], [1, 2]]


@pytest.mark.slow
def test_two_processes_watch_as_one(run, going_on, tmp_path):
    """They take the same checkpoints, divide the features, and SIGTERM ends both.

    The run removes a checkpoint just before process 1 reads it.
    """
    for step in (2, 3):
        add_checkpoint(run, going_on, step)
    fields = {"checkpoint": going_on, "follow": True, "follow_poll_seconds": 0.2}
    fields |= tiny_jobs.QUICK["knn"] | {"random_init": True}
    processes = tiny_jobs.start_two(tmp_path, "knn", fields, {"TINY_REMOVES": "2"})
    try:
        tiny_jobs.wait_for(processes, tmp_path, "waiting for the next checkpoint")
        processes[1].terminate()
        assert [process.wait(120) for process in processes] == [143, 143]
    finally:
        for process in processes:
            process.kill()
    assert follow.done_steps(str(tmp_path / "job")) == [1, 3]
    assert points(log_of(going_on, "job")) == [1, 3]
    assert "the checkpoint of step 2 was removed" in (tmp_path / "0.txt").read_text()
    for step in (1, 3):
        alone = tmp_path / f"alone_{step}"
        expected = jobs.run(
            make_config("knn", going_on / "checkpoints" / str(step), random_init=True), str(alone)
        )
        found = read(tmp_path / "job" / f"step_{step:08d}" / "results.json")
        assert found == expected | {"device_count": 2}
        of_both = tiny_jobs.confusion(tmp_path / "job" / f"step_{step:08d}")
        np.testing.assert_array_equal(of_both, tiny_jobs.confusion(alone))
