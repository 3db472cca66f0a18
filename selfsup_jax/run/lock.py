"""The lock of a workdir: one process at a time. On a disk `flock`, in a bucket numbered objects.

A bucket has no locks that end with their process. So the holder creates an object such as
`.lock/00000001`, which succeeds only if there is none of that name, and rewrites it every few
seconds. Who finds one that stays the same for a minute creates the next number: again only one of
several can. A holder that was only asleep finds the higher number and ends before it writes more.
Numbers are never used twice: the last one stays, marked as ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from selfsup_jax import paths
from selfsup_jax.devices import hosts, job
from selfsup_jax.errors import UserError
from selfsup_jax.run.progress import log

_FOLDER = ".lock"


class Timing:
    """How a lock in a bucket is kept, in seconds."""

    renew = 10.0  # from one renewal to the next
    expire = 60.0  # without a renewal for so long, the holder has died


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Holds the lock of a workdir, which exists, in this block.

    Raises:
        UserError: another process holds it.
        OSError: nothing can be written there.
    """
    if paths.is_bucket(workdir):
        with _ObjectLock(workdir):
            yield
        return
    # The operating system releases the lock when the process ends, even after a crash.
    with open(os.path.join(workdir, ".lock"), "a+") as lock:
        _flock(workdir, lock)
        yield


def _flock(workdir: str, lock: TextIO) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        raise _taken(workdir, f"process {lock.read().strip()}") from e
    except OSError:  # a file system without locks: no other process is kept out
        pass
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _taken(workdir: str, holder: str) -> UserError:
    return UserError(
        f"--workdir={workdir}: {holder} is running there; wait for it, stop it, or use another"
    )


def _lost(line: str) -> NoReturn:
    """Ends the process at once: what it still wrote would mix with another's."""
    hosts.end(2, line)
    job.leave(2, line)


class _ObjectLock:
    """The lock of a workdir in a bucket; see the top of this file."""

    def __init__(self, workdir: str, lost: Callable[[str], Any] = _lost):
        self._workdir = workdir
        self._folder = os.path.join(workdir, _FOLDER)
        self._lost = lost
        self._released = threading.Event()
        self._id = uuid.uuid4().hex
        self._number = 0
        self._renewals = 0

    def __enter__(self) -> _ObjectLock:
        last = self._last()
        if last:
            self._wait_for_the_end_of(last)
        self._number = last + 1
        try:
            paths.put(self._path(self._number), self._content(), new=True)
        except FileExistsError as e:
            faster = self._read(self._number) or {}
            if faster.get("id") != self._id:  # or the answer was lost, and it was put twice
                raise _taken(self._workdir, _described(faster)) from e
        newest = self._last()
        if newest > self._number:  # this number had been used and removed before
            paths.remove(self._path(self._number))
            raise _taken(self._workdir, _described(self._read(newest)))
        for number in self._numbers():
            if number < self._number:
                with contextlib.suppress(FileNotFoundError):
                    paths.remove(self._path(number))
        self._renewer = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._renewer.join()
        with contextlib.suppress(OSError):  # it expires
            paths.put(self._path(self._number), self._content(ended=True))

    def _wait_for_the_end_of(self, number: int) -> None:
        """Returns once the holder has ended or died; raises `UserError` if it is alive."""
        first = now = self._read(number)
        start, announced = time.monotonic(), False
        while now is not None and not now.get("ended"):
            if now != first:
                raise _taken(self._workdir, _described(now))
            if time.monotonic() - start > Timing.expire:
                log(f"{_described(now)} has died: this one takes {self._workdir} over")
                return
            if not announced:
                announced = True
                log(
                    f"--workdir={self._workdir}: {_described(now)} holds it; if that gives no sign "
                    f"of life for {Timing.expire:g} seconds, this one takes it over"
                )
            time.sleep(min(1.0, Timing.renew / 4))
            now = self._read(number)

    def _renew(self) -> None:
        while not self._released.wait(Timing.renew):
            # Without the bucket neither this process nor another can write there.
            with contextlib.suppress(OSError):
                if self._last() > self._number:
                    return self._lost(
                        f"--workdir={self._workdir}: another process has taken it over, because "
                        f"this one gave no sign of life for {Timing.expire:g} seconds; the same "
                        "command goes on when that one has ended"
                    )
                paths.put(self._path(self._number), self._content())

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, f"{number:08d}")

    def _numbers(self) -> list[int]:
        try:
            return [int(name) for name in paths.listdir(self._folder) if name.isdecimal()]
        except FileNotFoundError:
            return []

    def _last(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            with paths.open(self._path(number), "rb") as f:
                content = json.load(f)
        except FileNotFoundError:  # a later holder has removed it
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _content(self, ended: bool = False) -> bytes:
        self._renewals += 1
        holder = {"process": os.getpid(), "host": socket.gethostname(), "id": self._id}
        return json.dumps(holder | {"renewals": self._renewals, "ended": ended}).encode()


def _described(holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
