"""Processes that decode in place of threads: the same batches, and what happens when one dies."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny_work
from conftest import REPOSITORY, process_env
from PIL import Image
from test_canvas import jpeg, smooth

from selfsup_jax.data import pipeline, sources, workers
from selfsup_jax.data.batches import Undecodable
from selfsup_jax.data.crops import CropSpec
from selfsup_jax.errors import UserError

# Two global views and three local ones.
SPECS = (CropSpec(size=12),) * 2 + (CropSpec(size=6, area=(0.05, 0.3)),) * 3
BATCH = 10  # one part of eight images, one of two


def batches(source: sources.Source, count: int, **changes) -> list[dict]:
    given = {
        "seed": 3,
        "batch_size": BATCH,
        "positions": np.arange(BATCH, dtype=np.int32),
        "first_step": 0,
        "undecodable": Undecodable(source.num_examples, 0.1),
    }
    stream = pipeline.train_batches(source, SPECS, **(given | changes))
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> sources.Source:
    """25 in two classes; one is no image."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(25):
        path = root / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(smooth(30 + i, 40 - i // 2, seed=i)) if i != 7 else b"nothing")
    return sources.load("folder", str(root), "train", "data.train_split")


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [0, 48])
def test_processes_make_the_batches_that_threads_make(photographs, canvas):
    """Bit by bit, though memory is used again for later batches while earlier ones are kept."""
    expected, found = (batches(photographs, 12, canvas=canvas, processes=count) for count in (0, 2))
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def pool():
    made = workers.Processes(tiny_work.work, 2)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_memory_is_used_again_once_nothing_refers_to_it(kind, request):
    if kind == "threads":
        pool = workers.Threads(tiny_work.work)
        request.addfinalizer(pool.close)
    else:
        pool = request.getfixturevalue("pool")
    kept, seen = [], set()
    for number in range(1, 40):
        made, submit = pool.batch(tiny_work.LAYOUT)
        for rows in (slice(0, 3), slice(3, 4)):
            submit(rows, number).result()
        assert (made["image"] == number).all()
        seen.add(made["image"].ctypes.data)
        if number <= 3:
            kept.append(made["image"][2:].reshape(-1))  # a view of a view
        del made, submit
    assert len(seen) <= 5
    assert [set(x) for x in kept] == [{1}, {2}, {3}]


def test_a_worker_that_dies_or_fails_is_told(pool):
    _, submit = pool.batch(tiny_work.LAYOUT)
    process, ignores = submit(slice(0, 1), 9).result()
    assert process != os.getpid() and ignores  # a signal to all: this process decides
    with pytest.raises(RuntimeError, match=r"in a process that decodes images:(.|\n)*a mistake"):
        submit(slice(0, 4), 0).result()
    with pytest.raises(UserError) as told:
        submit(slice(0, 4), -1).result()
    assert str(told.value).startswith("config.data.processes=2: process ")
    assert "ended with signal 9, as without memory; the same command goes on" in str(told.value)


PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
import tiny_work
from selfsup_jax.data import workers
pool = workers.Processes(tiny_work.work, 2)
_, submit = pool.batch(tiny_work.LAYOUT)
assert submit(slice(0, 1), 9).result()[0] != os.getpid()
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them():
    program = PROGRAM.format(tests=str(pathlib.Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", program],
        **{"cwd": REPOSITORY, "env": process_env(), "timeout": 300},
        capture_output=True,
        text=True,
    )
    # They have its pipes too: `run` returned because they have ended.
    assert done.returncode == -9, done.stderr


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="counts Linux's pages")
def test_memory_is_flat_over_10000_batches(tmp_path):
    """A batch is 384 KiB: one in a hundred that stayed would be 36 MiB in the end."""
    for i in range(6):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    source = sources.load("folder", str(tmp_path), "train", "data.train_split")
    options = {"batch_size": 2, "positions": np.arange(2, dtype=np.int32), "canvas": 256}
    undecodable = Undecodable(6, 0.1)
    stream = pipeline.train_batches(
        source, SPECS, seed=0, first_step=0, undecodable=undecodable, **options
    )
    for count, batch in enumerate(itertools.islice(stream, 10_000), start=1):
        assert batch["image"].nbytes == 384 * 2**10
        if count == 1000:
            before = resident_bytes()
    assert resident_bytes() - before < 18 * 2**20


def test_arrays_lie_one_after_another():
    layout = {"a": ((3, 5), "uint8"), "b": ((2, 2), "int32"), "c": ((1,), "float32")}
    memory = np.zeros(workers.size_of(layout), np.uint8)
    arrays = workers.arrays_in(memory, layout)
    assert {name: (x.shape, str(x.dtype)) for name, x in arrays.items()} == layout
    starts = [x.ctypes.data - memory.ctypes.data for x in arrays.values()]
    assert starts == [0, 64, 128] and memory.size == 192
    for x in arrays.values():
        x[...] = 7
    assert [int((x == 7).sum()) for x in arrays.values()] == [15, 4, 1]
