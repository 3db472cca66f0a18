"""A process that decodes images for another one, which starts it: see `workers.py`."""

from __future__ import annotations

import functools
import mmap
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import numpy as np

from selfsup_jax.data import workers


def main(connection: Connection) -> None:
    """Does what it is told, until the process at the other end is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides
        signal.signal(number, signal.SIG_IGN)
    try:
        work = connection.recv()
        while True:
            path, layout, rows, task = connection.recv()
            arrays = workers.arrays_in(_mapped(path), layout)
            try:
                answer = work({name: x[rows] for name, x in arrays.items()}, *task), ""
            except Exception:
                answer = None, traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError):
        return


@functools.cache  # the same few are used again and again
def _mapped(path: str) -> np.ndarray:
    file = os.open(path, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(file, 0), np.uint8)
    finally:
        os.close(file)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
