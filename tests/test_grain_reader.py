"""`config.data.reader=grain`: the batches of our own reader, and what happens without Grain."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, process_env
from test_workers import BATCH, batches, photographs  # noqa: F401  a fixture

from selfsup_jax import checks, config
from selfsup_jax.data import grain_reader, pixels, sources
from selfsup_jax.data.batches import Undecodable
from selfsup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Read:
    """`Source.read`: places -> (bytes, labels, names)."""

    paths: tuple[str, ...]

    def __call__(self, places: np.ndarray) -> tuple[list[pixels.Encoded], np.ndarray, np.ndarray]:
        names = np.asarray([f"example {place}" for place in places], object)
        return [self.paths[place] for place in places], (places % 2).astype(np.int32), names


def as_records(source: sources.Source) -> sources.Source:
    """The split as one of which only the files know labels and names."""
    read = Read(tuple(source.images.tolist()))
    places = np.arange(source.num_examples)
    return dataclasses.replace(source, images=places, labels=None, read=read)


# One host of one; the second of two, for whom parts of 8 images don't fit the batch.
HOSTS = (np.arange(BATCH, dtype=np.int32), np.arange(1, BATCH, 2, dtype=np.int32))


@pytest.mark.parametrize("records", [False, True], ids=["files", "records"])
@pytest.mark.parametrize("positions", HOSTS, ids=["one host", "second of two"])
@pytest.mark.parametrize("canvas", [0, 48])
def test_threads_give_our_batches(photographs, canvas, positions, records):  # noqa: F811
    """From any step on, over two epochs, bit by bit, with a broken image told and replaced."""
    assert_same_batches(photographs, canvas, positions, records, processes=0)


@pytest.mark.slow
@pytest.mark.parametrize(("canvas", "records", "processes"), [(0, True, 2), (48, False, 3)])
def test_processes_give_our_batches(photographs, canvas, records, processes):  # noqa: F811
    assert_same_batches(photographs, canvas, HOSTS[0], records, processes)


def assert_same_batches(source, canvas, positions, records, processes):
    source = as_records(source) if records else source
    made, broken = {}, {}
    for reader in grain_reader.READERS:
        undecodable = Undecodable(source.num_examples, 0.1)
        options = {"canvas": canvas, "positions": positions, "undecodable": undecodable}
        options |= {"processes": processes * (reader == "grain"), "reader": reader}
        made[reader] = batches(source, 5, first_step=3, **options)
        broken[reader] = undecodable.names
    assert broken["grain"] == broken["builtin"] and len(broken["grain"]) == 1
    for ours, theirs in zip(made["builtin"], made["grain"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "a folder of that name"])
def test_without_the_package_it_is_told_at_once(folder, tmp_path, monkeypatch):
    if folder:
        (tmp_path / "grain").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "grain", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError) as told:
        checks.fields({"data": {"reader": "grain"}}, config._RUN)
    assert str(told.value) == (
        "config.data.reader='grain': needs the package grain, which is not installed: "
        "pip install grain"
    )


@pytest.mark.slow
def test_a_process_that_is_killed_is_told(photographs):  # noqa: F811
    def kill(step):
        if step == 3:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    stream = grain_reader.filled(
        (kill(step) for step in range(100)), parts_of(photographs), processes=1
    )
    with pytest.raises(UserError, match=r"^config\.data\.processes=1: a process of Grain's.*-9"):
        for _ in stream:
            pass


def parts_of(source: sources.Source) -> grain_reader.Parts:
    from selfsup_jax.data import parts
    from selfsup_jax.data.batches import Order

    work, layout = parts.for_training(source, (), 48, 0, BATCH)
    order = Order(source.num_examples, 0, BATCH, HOSTS[0])
    return grain_reader.Parts(work, layout, order, source.images, 0)


PROGRAM = """
import os
from selfsup_jax.data import grain_reader, sources
from test_grain_reader import parts_of
if __name__ == "__main__":
    source = sources.load("folder", {folder!r}, "train", "data.train_split")
    next(grain_reader.filled(iter("ab"), parts_of(source), 2))
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(photographs, tmp_path):  # noqa: F811
    folder = os.path.dirname(os.path.dirname(photographs.images[0]))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=folder))
    env = process_env()
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, str(program)],
        **{"cwd": tmp_path, "env": env, "timeout": 300},
        capture_output=True,
        text=True,
    )
    # They have its pipes too: `run` returned because they have ended.
    assert done.returncode == -9, done.stderr
