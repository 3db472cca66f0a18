"""SIGTERM and Ctrl-C: the current step is finished and saved, then the process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from typing import Any

import jax

from selfsup_jax.devices import hosts
from selfsup_jax.errors import Stopped


class StopSignals:
    """From `catch` to its exit, records SIGTERM and Ctrl-C; the loop checks them after each step.

    A second signal has its default effect: it ends the process at once. In a job of several hosts,
    `jax.distributed` handles SIGTERM and lets the hosts agree on a step; Ctrl-C becomes a SIGTERM.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._agreed = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        return self

    def catch(self) -> None:
        """Installs the handlers, when a step can be saved; before, a signal ends the process."""
        if threading.current_thread() is threading.main_thread():  # a requirement of Python
            several_hosts = jax.process_count() > 1
            self._agreed.enter_context(hosts.sigterm_agreed())
            for number in (signal.SIGINT,) if several_hosts else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        self._agreed.__exit__(*exception)

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._received = number
        for caught in self._previous:
            signal.signal(caught, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def received(self, step: int) -> int | None:
        """The signal to stop after this step, or None; the step is the same on every host."""
        if jax.process_count() > 1:
            return signal.SIGTERM if hosts.reached_preemption(step) else None
        return self._received

    def pending(self) -> int | None:
        """A signal that came after the last call of `received`; always None with several hosts."""
        return self._received if jax.process_count() == 1 else None


def stopped(number: int, step: int, workdir: str) -> Stopped:
    """The exception that ends the process after a signal, once step `step` is saved."""
    name = signal.Signals(number).name
    return Stopped(
        f"{name}: stopped after step {step:,}, which is saved in {workdir}; the same command "
        "resumes from there",
        status=128 + number,
    )
