"""What a run records: each step once, whatever an earlier process left; and what it shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import (
    EventFileLoader,
    RawEventFileLoader,
)
from tensorboard.util.tensor_util import make_ndarray

from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError
from selfsup_jax.run import metrics, progress
from selfsup_jax.run.metrics import Recorder


def values_of(step: int) -> dict[str, float]:
    """No short decimals, so that the digits of the file show; every third step is a look."""
    values = {"loss": 1 / (step + 2), "grad_norm/encoder": 1e-7 * step / 3}
    return values | ({"projection_std": step / 7} if step % 3 == 0 else {})


def record(workdir, first_step: int, last_step: int, close: bool = True) -> Recorder:
    """One process's part of a run."""
    recorder = Recorder(str(workdir), first_step)
    for step in range(first_step + 1, last_step + 1):
        recorder.write(step, values_of(step), {"images_per_second": 100.0 * step + first_step})
    recorder.close() if close else recorder.flush()
    return recorder


def event_files(workdir) -> list[pathlib.Path]:
    """In the order in which they were begun."""
    return sorted(
        (pathlib.Path(workdir) / name for name in os.listdir(workdir) if name.startswith("events")),
        key=lambda path: (int(path.name.split(".")[3]), int(path.name.split(".")[-1])),
    )


def points(workdir) -> list[tuple[str, int, float]]:
    """(tag without its group, step, value) of TensorBoard's points, as they lie in the files."""
    return [
        (value.tag.partition("/")[2], event.step, make_ndarray(value.tensor).item())
        for path in event_files(workdir)
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def expected_points(last_step: int) -> list[tuple[str, int, float]]:
    return [
        (name, step, float(np.float32(value)))
        for step in range(1, last_step + 1)
        for name, value in values_of(step).items()
    ]


def lines(workdir) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    now = time.time()
    assert all(now - 600 < line.pop("wall_time") < now + 1 for line in found)
    return found


def check_holds(workdir, last_step: int) -> None:
    """Each step up to the last once, in both places, speeds in TensorBoard only."""
    steps = range(1, last_step + 1)
    assert lines(workdir) == [{"step": step, **values_of(step)} for step in steps]
    found = points(workdir)
    speeds = [point for point in found if point[0] == "images_per_second"]
    assert [step for _, step, _ in speeds] == list(steps)
    assert sorted(set(found) - set(speeds)) == sorted(expected_points(last_step))
    assert len(found) - len(speeds) == len(expected_points(last_step))


def check_history(history, last_step: int) -> None:
    expected: dict = {}
    for step in range(1, last_step + 1):
        for name, value in values_of(step).items():
            steps, series = expected.setdefault(name, ([], []))
            steps.append(step)
            series.append(value)
    assert history == expected


def test_a_run_that_begins_again_keeps_what_was_recorded_before(tmp_path, capfd):
    """Its checkpoints may only be out of reach, on a disk that is not mounted."""
    record(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    record(tmp_path, 0, 3)
    assert (tmp_path / "metrics.before.jsonl").read_bytes() == before
    assert "metrics.before.jsonl" in capfd.readouterr().err
    check_holds(tmp_path, 3)


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "events.csv").write_text("when,what\n")
    (tmp_path / "events.notes").write_bytes(b"")
    record(tmp_path, 0, 2)
    record(tmp_path, 1, 2)
    assert (tmp_path / "events.csv").read_text() == "when,what\n"
    assert (tmp_path / "events.notes").exists()


BROKEN = (
    *(b"\0\0\0", b"\xff\xfe", b"{}", b"7", b"[" * 9999),
    *(b'{"step": "2"}', b'{"step": 2, "loss": []}'),
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: str(broken[:24]))
def test_a_broken_line_is_named_and_left_out(tmp_path, broken, capfd):
    """A run goes on without it; what was there is kept."""
    record(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    content[1] = broken + b"\n"
    path.write_bytes(b"".join(content))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 cannot be read"):
        metrics.read_history(str(tmp_path))
    recorder = Recorder(str(tmp_path), 3)
    recorder.close()
    assert recorder.history["loss"][0] == [1, 3]
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    aside = tmp_path / "metrics.damaged.jsonl"
    assert aside.read_bytes() == b"".join(content)
    (told,) = capfd.readouterr().err.splitlines()
    assert told == f"{path}: line 2 cannot be read, left out; all of it is in {aside}"


def test_metrics_that_are_missing_or_a_folder_are_told(tmp_path, capfd):
    record(tmp_path, 5, 6)
    path = tmp_path / "metrics.jsonl"
    assert f"{path} is missing: the curves begin at step 6" in capfd.readouterr().err
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read: Is a directory; move it"):
        Recorder(str(tmp_path), 3)


def test_damaged_events_are_told(tmp_path, capfd):
    """What was cut off at the end, as by a kill, is not: it comes again."""
    record(tmp_path, 0, 5)
    (path,) = event_files(tmp_path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-7])
    Recorder(str(tmp_path), 5).close()
    assert capfd.readouterr().err == ""
    content[len(content) // 2 :] = b"\xff" * (len(content) // 2)
    path.write_bytes(content)
    Recorder(str(tmp_path), 5).close()
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith(f"{path}: is damaged; TensorBoard's points")


# --------------------------------------------------------------------------------- one run


def test_what_is_written_can_be_read(tmp_path):
    recorder = record(tmp_path, 0, 5)
    check_holds(tmp_path, 5)
    check_history(recorder.history, 5)
    check_history(metrics.read_history(str(tmp_path)), 5)
    assert metrics.read_history(str(tmp_path / "none")) == {}


def test_all_is_there_for_others_to_read_after_a_flush(tmp_path):
    """Such as for the process that goes on when this one is killed."""
    recorder = record(tmp_path, 0, 3, close=False)
    check_holds(tmp_path, 3)
    recorder.write(4, values_of(4), {"images_per_second": 1.0})
    recorder.flush()
    check_holds(tmp_path, 4)
    recorder.close()
    check_holds(tmp_path, 4)


def test_a_recorder_that_nothing_is_given_leaves_no_events(tmp_path):
    recorder = Recorder(str(tmp_path), 0)
    recorder.flush()
    recorder.close()
    assert not event_files(tmp_path) and not lines(tmp_path)


def test_only_one_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "is_writer", lambda: False)
    recorder = record(tmp_path, 0, 2)
    recorder.flush()
    assert not os.listdir(tmp_path) and recorder.history == {}


# ------------------------------------------------------------------------ runs that go on


@pytest.mark.parametrize(
    ("content", "every", "told"),
    [
        (b"", 2, "no points of steps 1 to 9"),
        (b"", 10, ""),  # the first point comes later
        (b'{"step": 2}\n{"step": 4}\n{"ste', 2, "no points of steps 5 to 9"),
        (b'{"step": 4}\n{"step": 8}\n', 4, ""),
        (b'{"step": 4}\n{"step": 8}\n', 1, ""),  # more often from now on
    ],
)
def test_points_that_are_missing_are_told(tmp_path, capsys, content, every, told):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    Recorder(str(tmp_path), 9, every).close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and all(told in line for line in lines)


@pytest.mark.parametrize("first_step", [0, 1, 4, 6])
def test_a_run_that_goes_on_takes_back_what_comes_again(tmp_path, first_step):
    record(tmp_path, 0, 6)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    events = list(RawEventFileLoader(str(event_files(tmp_path)[0])).Load())
    recorder = Recorder(str(tmp_path), first_step)
    check_history(recorder.history, first_step)
    # Up to the checkpoint byte for byte as it was, and nothing after it.
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:first_step])
    kept = [e for path in event_files(tmp_path) for e in RawEventFileLoader(str(path)).Load()]
    assert kept == (events[: len(kept)] if first_step else [])
    assert {step for _, step, _ in points(tmp_path)} == set(range(1, first_step + 1))

    for step in range(first_step + 1, 9):
        recorder.write(step, values_of(step), {"images_per_second": 1.0})
    recorder.close()
    check_holds(tmp_path, 8)
    check_history(recorder.history, 8)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_may_go_on_again_and_again(tmp_path):
    for first_step, last_step in ((0, 5), (3, 6), (2, 4), (4, 9), (9, 9), (8, 11)):
        record(tmp_path, first_step, last_step)
        check_holds(tmp_path, last_step)


def test_file_of_events_that_has_nothing_to_take_back_is_left_alone(tmp_path):
    record(tmp_path, 0, 3)
    (path,) = event_files(tmp_path)
    os.utime(path, (1, 1))
    record(tmp_path, 3, 5)
    assert path.stat().st_mtime == 1 and len(event_files(tmp_path)) == 2


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, lost):
    record(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - lost)  # of step 4; with 1, its end of line alone
    assert metrics.read_history(str(tmp_path))["loss"][0] == [1, 2, 3]
    record(tmp_path, 3, 6)
    check_holds(tmp_path, 6)


@pytest.mark.parametrize("lost", [1, 4, 9, 30, 60])
@pytest.mark.parametrize("first_step", [2, 3])
def test_a_file_of_events_that_was_cut_off_is_mended(tmp_path, lost, first_step):
    """A process that is killed may have written a part of a record."""
    record(tmp_path, 0, 4)
    (path,) = event_files(tmp_path)
    assert {step for _, step, _ in points(tmp_path)} == {1, 2, 3, 4}
    os.truncate(path, path.stat().st_size - lost)  # of what was recorded of step 4
    assert len(points(tmp_path)) < len(expected_points(4)) + 4
    record(tmp_path, first_step, 6)
    check_holds(tmp_path, 6)


@pytest.mark.parametrize("size", [0, 3, 20, 40])
def test_a_file_of_events_that_was_only_begun_is_no_hindrance(tmp_path, size):
    """Cut off within its first record, which tells no more than its version."""
    record(tmp_path, 0, 2)
    (path,) = event_files(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    os.truncate(path, size)
    record(tmp_path, 0, 3)
    assert len(event_files(tmp_path)) == 1  # the one that was begun is gone
    check_holds(tmp_path, 3)


@pytest.mark.parametrize("name", ["run[x]", "run*", "[!a]?"])
def test_a_workdir_may_have_any_name(tmp_path, name):
    """Its neighbours, which the name would match as a pattern, are left alone."""
    neighbours = [tmp_path / other for other in ("runx", "run", "b2")]
    for workdir in (*neighbours, tmp_path / name):
        workdir.mkdir()
        record(workdir, 0, 4)
    record(tmp_path / name, 2, 5)
    check_holds(tmp_path / name, 5)
    for workdir in neighbours:
        check_holds(workdir, 4)


# ------------------------------------------------------------------------------- progress


class Clock:
    """In place of the module `time`."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(stream: io.StringIO) -> str:
    """The last line."""
    return stream.getvalue().splitlines()[-1]


def test_rate_and_time_to_go(clock):
    stream = io.StringIO()
    line = progress.Progress(1000, first_step=0, images_per_step=64, knn_k=20, stream=stream)
    line.restart(1)
    clock.now += 10
    rate = line.show(101, {"loss": 0.123456})["images_per_second"]
    assert rate == 640.0
    assert shown(stream) == "step 101/1000 (10%)  640 images/s  ETA 1m30s  loss 0.1235"
    clock.now += 30  # slower: the rate is the interval's, the time to go that of all so far
    assert (
        line.show(201, {"loss": 1.0, "probe_top1": 0.5, "knn_top1": 0.913})["images_per_second"]
        == 64 * 100 / 30
    )
    for part in ("step 201/1000", "213 images/s", "ETA 2m40s", "50.0%", "kNN (k 20) 91.3%"):
        assert part in shown(stream)
    assert line.images_per_second == 64 * 200 / 40


def test_a_first_line_without_a_rate(clock):
    stream = io.StringIO()
    line = progress.Progress(total=10, first_step=0, images_per_step=2, stream=stream)
    line.restart(1)
    clock.now += 5
    assert line.show(1, {"loss": 1.0}) == {} and line.images_per_second == 0.0
    assert shown(stream) == "step 1/10 (10%)  loss 1.0000"


def test_what_was_done_before_is_not_this_processs_speed(clock):
    line = progress.Progress(total=100, first_step=50, images_per_step=2, stream=io.StringIO())
    clock.now += 5
    assert line.show(60, {"loss": 1.0})["images_per_second"] == 4.0


def test_a_pause_is_left_out(clock):
    stream = io.StringIO()
    line = progress.Progress(total=100, first_step=0, images_per_step=10, stream=stream)
    clock.now += 1
    with line.pause():
        clock.now += 500
    clock.now += 1
    with line.pause():
        clock.now += 70
    assert line.show(10, {"loss": 1.0})["images_per_second"] == 50.0
    assert line.images_per_second == 50.0 and "ETA 18s" in shown(stream)
    with line.pause():
        clock.now += 500
    clock.now += 1
    assert line.show(20, {"loss": 1.0})["images_per_second"] == 100.0


def test_expectation(clock):
    line = progress.Progress(total=72_011, first_step=0, images_per_step=32)
    clock.now += 100  # compiling
    line.restart(1)
    clock.now += 1
    with line.pause():
        clock.now += 1000
    clock.now += 1
    told = line.expectation(11)  # ten steps in two seconds
    assert "160 images/s" in told and "about 4h00m" in told


def test_expectation_is_of_all_the_steps_since_the_first(clock):
    """Whatever lines were shown in between: of one step alone it would be a matter of chance."""
    line = progress.Progress(total=100, first_step=0, images_per_step=10, stream=io.StringIO())
    line.restart(1)
    clock.now += 10
    line.show(11, {"loss": 1.0})
    clock.now += 100
    assert "1 images/s" in line.expectation(12)


@contextlib.contextmanager
def terminal():
    """Where both the live line and the news go."""
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def test_a_terminals_line_renews_itself(clock):
    with terminal() as stream:
        line = progress.Progress(total=100, first_step=0, images_per_step=1)
        line.show(10, {"loss": 1.0, "knn_top1": 0.5})
        line.show(20, {"loss": 2.0})
        first, second = stream.getvalue().split("\r")[1:]
        assert "step 10" in first and "step 20" in second and "\n" not in first + second
        assert len(second) >= len(first)  # nothing of the longer one is left
        line.close()
        line.close()  # once is enough
    assert stream.getvalue() == "\r" + first + "\r" + second + "\n"


def test_news_break_the_live_line(clock):
    with terminal() as stream:
        line = progress.Progress(total=100, first_step=0, images_per_step=1)
        line.announce("first")  # no line is there to be broken
        line.show(10, {"loss": 1.0})
        line.announce("second")
        line.announce("third")
        line.show(20, {"loss": 1.0})
    lines = stream.getvalue().split("\n")
    assert lines[0] == "first" and lines[1].startswith("\rstep 10")
    assert lines[2:4] == ["second", "third"]
    assert lines[4].startswith("\rstep 20") and len(lines) == 5


def test_elsewhere_there_are_plain_lines(clock, capfd):
    line = progress.Progress(total=100, first_step=0, images_per_step=1)
    line.show(10, {"loss": 1.0})
    line.announce("news")
    line.show(20, {"loss": 1.0})
    line.close()
    out, err = capfd.readouterr()
    assert not out and "\r" not in err
    assert [text.split("/")[0] for text in err.splitlines()] == ["step 10", "news", "step 20"]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_hosts_say_nothing(clock, capfd, monkeypatch, stream):
    monkeypatch.setattr(hosts, "is_writer", lambda: False)
    stream = stream()
    line = progress.Progress(total=100, first_step=0, images_per_step=1, stream=stream)
    clock.now += 1
    assert line.show(10, {"loss": 1.0})["images_per_second"] == 10.0
    line.announce("news")
    line.close()
    assert not stream.getvalue() and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3600, "1h00m"), (100_000, "1d03h")],
)
def test_format_seconds(seconds, text):
    assert progress.format_seconds(seconds) == text


def test_waiting_for_images_is_told(monkeypatch, clock):
    stream = io.StringIO()
    line = progress.Progress(100, 0, 10, stream=stream)
    told = []
    monkeypatch.setattr(progress, "log", told.append)
    for step, waited, share in ((10, 0.25, 0.05), (20, 1.0, 0.2), (30, 9.0, 1.0), (40, 2.0, 0.4)):
        clock.now += 5
        assert line.show(step, {"loss": 1.0}, waited)["input_wait"] == share
    lines = stream.getvalue().splitlines()
    assert "waits" not in lines[0] and "waits for images 20% of the time" in lines[1]
    assert len(told) == 1 and "--config.data.crop_on=device" in told[0]
    assert "input_wait" not in line.show(50, {"loss": 1.0})
