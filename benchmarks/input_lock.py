"""How long Python's lock is held for an image, and so how many threads can decode at once.

python -m benchmarks.input_lock --config=configs/byol.py --config.data.dir=TFDS_DIR

A process decodes in one thread. Another one looks into its memory a few thousand times: does a
thread hold the lock now? (Linux, CPython 3.11, whose runtime has a word that says so.)
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.data import inputs, pipeline

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "how long to look")
_CHILD = flags.DEFINE_boolean("child", False, "be the process that decodes")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_RUNTIME_BYTES = 2**16
CORES = (2, 8, 16, 32, 100)


def words_with_the_holder() -> list[int]:
    """Addresses in CPython's runtime of words that name the thread that has the lock."""
    get = ctypes.pythonapi.PyThreadState_Get
    get.restype = ctypes.c_void_p
    start = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    copied = ctypes.string_at(start, _RUNTIME_BYTES)  # while this thread has the lock
    words = np.frombuffer(copied, np.uint64)
    return [start + 8 * int(i) for i in np.flatnonzero(words == get())]


def decode(config, seconds: float) -> None:
    """Decodes and says so: addresses, then images and CPU seconds."""
    data = inputs.load_data(config)
    stream = inputs.train_batches(config, data, first_step=0)
    works = []
    original = pipeline.workers.pool
    pipeline.workers.pool = lambda work, processes: works.append(work) or original(work, processes)
    next(stream)
    stream.close()
    (work,) = works
    specs = inputs.crop_specs(config)
    side = config.data.canvas
    made = {f"view_{i}": np.empty((8, s.size, s.size, 3), np.uint8) for i, s in enumerate(specs, 1)}
    if config.data.crop_on == "device":
        made = {"image": np.empty((8, side, side, 3), np.uint8), "size": np.empty((8, 2), np.int32)}
    print(*words_with_the_holder(), flush=True)
    time.sleep(2)  # without the lock: the other one sees which word is empty now
    count, begin, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds + 1:
        rows = np.arange(count, count + 8) % data.train.num_examples
        work(made, 0, rows.astype(np.int32), data.train.images[rows])
        count += 8
    print(count, time.process_time() - cpu, flush=True)


def held(arguments: list[str], seconds: float) -> tuple[float, float]:
    """(share of the moments in which the lock is held, CPU seconds an image)."""
    command = [sys.executable, "-m", "benchmarks.input_lock", *arguments, "--child"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    addresses = [int(word) for word in child.stdout.readline().split()]
    memory = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY)
    time.sleep(1)
    empty = [a for a in addresses if not any(os.pread(memory, 8, a))]
    time.sleep(1.5)
    rng, hits, looks, begin = np.random.default_rng(0), 0, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        time.sleep(rng.uniform(0.0005, 0.0015))
        hits += any(os.pread(memory, 8, empty[0]))
        looks += 1
    count, cpu = child.stdout.readline().split()
    child.wait()
    return hits / looks, float(cpu) / int(count)


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config = _CONFIG.value
    config.data.placement = "host"
    if _CHILD.value:
        return decode(config, _SECONDS.value)
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--seconds", "--json"))]
    rows: list[report.Row] = []
    for crop_on in inputs.CROP_ON:
        given = [*arguments, f"--config.data.crop_on={crop_on}", f"--seconds={_SECONDS.value}"]
        share, cpu = held(given, _SECONDS.value)
        rows += [
            (f"crop_on={crop_on}: CPU time of an image", 1e6 * cpu, "us"),
            (f"crop_on={crop_on}: of it with the lock", 1e6 * cpu * share, "us"),
            (
                f"crop_on={crop_on}: images per second that one lock allows",
                1 / (cpu * share),
                "1/s",
            ),
        ]
        for cores in CORES:
            # Amdahl: what has the lock is done by one thread at a time.
            speed = min(cores, 1 / share)
            name = f"crop_on={crop_on}: threads on {cores} cores, at most as fast as"
            rows.append((name, speed, "cores"))
    report.show("Python's lock", rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
