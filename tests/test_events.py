"""TensorBoard's event files: written and cut by our own code, read back by TensorBoard's."""

from __future__ import annotations

import os
import pathlib
import struct

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import (
    EventFileLoader,
    RawEventFileLoader,
)
from tensorboard.util.tensor_util import make_ndarray

from selfsup_jax.run import events


def values_of(step: int) -> dict[str, float]:
    return {"loss": 1 / (step + 2), "grad_norm/encoder": -1e-7 * step, "größe": 2.0**step}


def write(directory: pathlib.Path, first: int, last: int) -> pathlib.Path:
    """A file with the steps from `first` to `last`."""
    before = set(directory.iterdir())
    writer = events.EventWriter(str(directory))
    for step in range(first, last + 1):
        writer.write_scalars(step, values_of(step))
    writer.close()
    (path,) = set(directory.iterdir()) - before
    return path


def loaded(path: pathlib.Path) -> list[tuple[str, int, float]]:
    return [
        (value.tag, event.step, make_ndarray(value.tensor).item())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def expected(first: int, last: int) -> list[tuple[str, int, float]]:
    return [
        (name, step, float(np.float32(value)))
        for step in range(first, last + 1)
        for name, value in values_of(step).items()
    ]


def test_tensorboard_reads_what_was_written(tmp_path):
    path = write(tmp_path, 1, 5)
    assert path.match(events.PATTERN)
    assert loaded(path) == expected(1, 5)
    accumulated = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(accumulated.Tags()["scalars"]) == sorted(values_of(1))
    for name in values_of(1):
        points = [(name, event.step, event.value) for event in accumulated.Scalars(name)]
        assert points == [point for point in expected(1, 5) if point[0] == name]
    times = [event.wall_time for event in accumulated.Scalars("loss")]
    assert times == sorted(times) and times[0] > 1.7e9


def test_values_that_are_not_finite_are_kept(tmp_path):
    writer = events.EventWriter(str(tmp_path))
    writer.write_scalars(3, {"a": float("nan"), "b": float("inf"), "c": -float("inf")})
    writer.close()
    (path,) = tmp_path.iterdir()
    np.testing.assert_equal([value for *_, value in loaded(path)], [np.nan, np.inf, -np.inf])


def test_writers_that_start_in_the_same_second_have_files_of_their_own(tmp_path):
    """Such as a job that goes on at once in the process that stopped it."""
    writers = [events.EventWriter(str(tmp_path)) for _ in range(3)]
    for step, writer in enumerate(writers):
        writer.write_scalars(step, values_of(step))
    for writer in writers:
        writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert sorted(point for path in tmp_path.iterdir() for point in loaded(path)) == sorted(
        expected(0, 2)
    )


def test_what_is_flushed_can_be_read(tmp_path):
    writer = events.EventWriter(str(tmp_path))
    writer.write_scalars(1, values_of(1))
    writer.flush()
    (path,) = tmp_path.iterdir()
    assert loaded(path) == expected(1, 1)
    writer.close()


@pytest.mark.parametrize("last", [1, 2, 4])
def test_a_cut_leaves_exactly_the_steps_before(tmp_path, last):
    path = write(tmp_path, 1, 5)
    whole = list(RawEventFileLoader(str(path)).Load())
    events.cut(str(path), last)
    # The file's version and the records of these steps, byte for byte.
    assert list(RawEventFileLoader(str(path)).Load()) == whole[: last + 1]
    assert loaded(path) == expected(1, last)
    assert list(tmp_path.iterdir()) == [path]


def test_steps_that_are_not_in_order_are_cut_as_well(tmp_path):
    writer = events.EventWriter(str(tmp_path))
    for step in (4, 1, 9, 2):
        writer.write_scalars(step, values_of(step))
    writer.close()
    (path,) = tmp_path.iterdir()
    events.cut(str(path), 3)
    assert loaded(path) == expected(1, 2)


def test_a_file_without_a_step_left_is_removed(tmp_path):
    path = write(tmp_path, 3, 5)
    events.cut(str(path), 2)
    assert not path.exists()


@pytest.mark.parametrize("last", [5, 99])
def test_a_file_with_nothing_to_cut_is_not_touched(tmp_path, last):
    path = write(tmp_path, 1, 5)
    os.utime(path, (1, 1))
    content = path.read_bytes()
    events.cut(str(path), last)
    assert path.read_bytes() == content and path.stat().st_mtime == 1


@pytest.mark.parametrize("last", [2, 4, 5])
def test_an_incomplete_record_at_the_end_is_dropped_wherever_it_was_cut_off(tmp_path, last):
    """A process may be killed at any byte; a file that goes on behind it would be unreadable."""
    whole = write(tmp_path, 1, 5).read_bytes()
    starts, start = [], 0
    while start < len(whole):
        starts.append(start)
        (length,) = struct.unpack_from("<Q", whole, start)
        start += 16 + length
    assert len(starts) == 6 and start == len(whole)
    path = tmp_path / "events.out.tfevents.1.cut"
    for end in range(starts[5] + 1, len(whole)):  # within the record of step 5
        path.write_bytes(whole[:end])
        events.cut(str(path), last)
        kept = min(last, 4)
        assert loaded(path) == expected(1, kept)
        assert path.read_bytes() == whole[: starts[kept + 1]]


@pytest.mark.parametrize("last", [3, 5])
@pytest.mark.parametrize(
    "tail",
    [bytes(100), struct.pack("<QI", 6, 0) + b"\xff" * 10, b"\xff" * 40],
    ids=["zeros", "no event", "no length"],
)
def test_a_damaged_end_is_dropped(tmp_path, tail, last):
    """As a machine that lost its power may leave it."""
    path = write(tmp_path, 1, 5)
    with open(path, "ab") as f:
        f.write(tail)
    events.cut(str(path), last)
    assert loaded(path) == expected(1, last)
    assert len(list(RawEventFileLoader(str(path)).Load())) == last + 1
    assert tail not in path.read_bytes()


def test_a_workdir_of_an_earlier_version_is_cut_too(tmp_path):
    """Its scalars are tensors, as TensorFlow writes them."""
    import tensorflow as tf

    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        for step in range(1, 6):
            tf.summary.scalar("loss", 1 / step, step=step)
    writer.close()
    (path,) = tmp_path.glob(events.PATTERN)
    events.cut(str(path), 3)
    assert [step for _, step, _ in loaded(path)] == [1, 2, 3]
