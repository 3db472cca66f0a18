"""SIGTERM and Ctrl-C: the step at hand is finished and saved, then the process ends."""

from __future__ import annotations

import os
import signal
import threading
import types
from typing import Any

import jax

from selfsup_jax.devices import hosts
from selfsup_jax.errors import Stopped


class StopSignals:
    """From `catch` to its end SIGTERM and Ctrl-C are noted, for the loop to ask after each step.

    A second signal ends the process at once, as if it had not been caught. In a job of many hosts
    `jax.distributed` takes SIGTERM and agrees with the others on a step; Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        return self

    def catch(self) -> None:
        """Begins: once there is a step to save. Before, a signal may as well end the process."""
        if threading.current_thread() is threading.main_thread():  # else Python takes no handlers
            many = jax.process_count() > 1
            for number in (signal.SIGINT,) if many else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._received = number
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def received(self, step: int) -> int | None:
        """The signal that asks for a stop after this step, on every host at the same; or None."""
        if jax.process_count() > 1:
            return signal.SIGTERM if hosts.reached_preemption(step) else None
        return self._received

    def pending(self) -> int | None:
        """A signal that came after the last step was asked about; on one host only."""
        return self._received if jax.process_count() == 1 else None


def stopped(number: int, step: int, workdir: str) -> Stopped:
    """What ends the process after a signal, once step `step` is saved."""
    name = signal.Signals(number).name
    return Stopped(
        f"{name}: stopped after step {step:,}, which is saved in {workdir}; the same command goes "
        "on from there",
        status=128 + number,
    )
