"""Notices a process whose main thread hangs: in a deadlock, or at a file system that is stuck.

Its link still answers, and the others wait for it at a collective for ever. All processes of a job
pass the same places of the training loop in the same order, and count them. A process hangs if it
is behind the others, at least one of which has waited for it for the whole timeout, and if it has
neither computed nor read or written files in that time. So nothing that takes long is held against
a process that works, such as compiling, evaluating, drawing, or reading from a file system that is
slow; nor is what all of them wait for together.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping
from typing import Any

_IDLE = 0.01  # of a core, or 100 kB/s: below it, a process does nothing


def _work() -> float:
    """The CPU seconds of this process so far, to which 10 MB read or written add one."""
    moved = 0
    with contextlib.suppress(OSError, ValueError), open("/proc/self/io", "rb") as f:  # of Linux
        moved = sum(int(line.split()[1]) for line in itertools.islice(f, 2))
    return time.process_time() + moved / 1e7


class Activity:
    """What this process did lately; `report` is called every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self._interval, self._places = interval, 0
        self._since = self._idle_since = time.monotonic()
        self._last = (time.monotonic(), _work())

    def pass_place(self) -> None:
        """Counts a place that all processes pass."""
        self._places, self._since = self._places + 1, time.monotonic()

    def report(self) -> dict[str, Any]:
        """The count of places, and for how many seconds it has stood, and nothing was done."""
        (before, used_before), now, used = self._last, time.monotonic(), _work()
        if now - before > 2 * self._interval + 1:  # it was paused, perhaps with its machine
            self._since = self._idle_since = now
        if used - used_before > _IDLE * (now - before):
            self._idle_since = now
        self._last = (now, used)
        stood = now - self._since
        return {"places": self._places, "stood": stood, "idle": min(stood, now - self._idle_since)}


def hanging(reports: Mapping[int, Mapping[str, Any]], timeout: float) -> list[int]:
    """The processes that hang, given the newest report of each process."""
    first = min((report["places"] for report in reports.values()), default=0)
    ahead = [report for report in reports.values() if report["places"] > first]
    if not any(report["stood"] > timeout for report in ahead):
        return []
    behind = (process for process in reports if reports[process]["places"] == first)
    return [process for process in behind if reports[process]["idle"] > timeout]
