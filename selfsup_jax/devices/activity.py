"""Notices a process whose main thread hangs: in a deadlock, or at a file system that is stuck.

Its link still answers, and the others wait for it at a collective for ever. All processes of a job
pass the same places of the training loop in the same order, and count them. A process hangs if it
is behind the others, at least one of which has waited for it for the whole timeout, and if it has
used no CPU in that time. So nothing that takes long is held against a process that works, such as
reading, compiling, evaluating and drawing; nor is what all of them wait for together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_IDLE = 0.01  # of a core: below it, a process does nothing


class Activity:
    """What this process did lately; `report` is called every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self._interval, self._places = interval, 0
        self._since = self._idle_since = time.monotonic()
        self._last = (time.monotonic(), time.process_time())

    def pass_place(self) -> None:
        """Counts a place that all processes pass."""
        self._places, self._since = self._places + 1, time.monotonic()

    def report(self) -> dict[str, Any]:
        """The count of places, and for how many seconds it has stood, and nothing was done."""
        (before, used_before), now, used = self._last, time.monotonic(), time.process_time()
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
