"""Who fills the arrays of batches: threads of this process, or processes of their own.

Threads share Python's lock; processes have one each, and write into memory that they share with
this one. They end with it, however it ends.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import mmap
import multiprocessing
import os
import queue
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from selfsup_jax.errors import UserError, bad_field

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[tuple[int, ...], str]]  # name -> shape and type
Submit = Callable[..., concurrent.futures.Future]
BATCHES_AHEAD = 3  # that are being filled while one is used
_ALIGNED = 64  # bytes, as JAX likes arrays to start


class Pool(Protocol):
    """Fills batches by calling `work(arrays, *task)` for parts of them."""

    def batch(self, layout: Layout) -> tuple[Arrays, Submit]:
        """New arrays, and `submit(rows: slice, *task)` that has these rows of them filled."""

    def close(self) -> None:
        """Ends all that was started; what is not filled yet never will be."""


def pool(work: Callable[..., Any], processes: int) -> Pool:
    """Processes, or threads if `processes` is 0."""
    return Processes(work, processes) if processes else Threads(work)


class Threads:
    """A pool of as many threads as the machine has cores."""

    def __init__(self, work: Callable[..., Any]):
        self._work = work
        self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")
        self._memories = Memories(Memory)

    def batch(self, layout: Layout) -> tuple[Arrays, Submit]:
        """See `Pool`."""
        arrays = arrays_in(self._memories.take(layout)[0], layout)

        def submit(rows: slice, *task: Any) -> concurrent.futures.Future:
            part = {name: x[rows] for name, x in arrays.items()}
            return self._threads.submit(self._work, part, *task)

        return arrays, submit

    def close(self) -> None:
        """See `Pool`."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Processes:
    """A pool of processes, each with a thread here that waits for it.

    Args:
        work: can be pickled, as its tasks and results.
        count: of the processes.
    """

    def __init__(self, work: Callable[..., Any], count: int):
        if not hasattr(os, "memfd_create"):
            raise bad_field("data.processes", count, "needs Linux; 0: threads")
        self._workers = [_Worker(work, count) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "worker")
        self._memories = Memories(_SharedMemory)

    def batch(self, layout: Layout) -> tuple[Arrays, Submit]:
        """See `Pool`."""
        whole, memory = self._memories.take(layout)

        def submit(rows: slice, *task: Any) -> concurrent.futures.Future:
            return self._threads.submit(self._run, memory.path, layout, rows, task)

        return arrays_in(whole, layout), submit

    def _run(self, *task: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker(task)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """See `Pool`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()


class Memories:
    """The memory of batches, used again once nothing refers to their arrays.

    Fresh memory costs time: the system fills it with zeros.
    """

    def __init__(self, new: Callable[[int], Memory]):
        self._new = new  # bytes -> memory
        self._free: collections.deque[Any] = collections.deque()

    def take(self, layout: Layout) -> tuple[np.ndarray, Any]:
        """(`[bytes]` uint8 to which all arrays made from it refer, the memory below it)."""
        memory = self._free.popleft() if self._free else self._new(size_of(layout))
        whole = np.frombuffer(memory.mapped, np.uint8)
        weakref.finalize(whole, self._free.append, memory).atexit = False
        return whole, memory


class Memory:
    """Memory of this process."""

    def __init__(self, size: int):
        self.mapped = mmap.mmap(-1, size)


class _SharedMemory(Memory):
    """Memory without a name, which other processes find through this one; it ends with them."""

    def __init__(self, size: int):
        self._file = os.memfd_create("selfsup_jax_batch")
        os.ftruncate(self._file, size)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.mapped = mmap.mmap(self._file, size)

    def __del__(self) -> None:
        os.close(self._file)


class _Worker:
    """A process of `worker.py`."""

    def __init__(self, work: Callable[..., Any], count: int):
        self._connection, other = multiprocessing.Pipe()
        self._count = count
        command = [sys.executable, "-m", "selfsup_jax.data.worker", str(other.fileno())]
        # It draws boxes, on the CPU; another process may have the accelerator to itself.
        paths = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
        )
        other.close()  # so that the connection ends with the process
        self._connection.send(work)

    def __call__(self, task: Any) -> Any:
        try:
            self._connection.send(task)
            result, error = self._connection.recv()
        except (EOFError, OSError) as e:
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise UserError(
                f"config.data.processes={self._count}: process {self._process.pid}, which decodes "
                f"images, ended with {how}{', as without memory' * (status == -9)}; the same "
                "command goes on from the last checkpoint"
            ) from e
        if error:
            raise RuntimeError(f"in a process that decodes images:\n{error}")
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def size_of(layout: Layout) -> int:
    """The bytes of arrays that lie one after another."""
    return sum(_bytes(*array) for array in layout.values())


def arrays_in(memory: np.ndarray, layout: Layout) -> Arrays:
    """The arrays that lie one after another in `[bytes]` uint8; they keep `memory` alive."""
    arrays, start = {}, 0
    for name, (shape, kind) in layout.items():
        size = math.prod(shape) * np.dtype(kind).itemsize
        arrays[name] = memory[start : start + size].view(kind).reshape(shape)
        start += _bytes(shape, kind)
    return arrays


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    return -(-max(1, math.prod(shape) * np.dtype(kind).itemsize) // _ALIGNED) * _ALIGNED
