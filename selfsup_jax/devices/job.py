"""A job of several hosts in this process: how it is joined, and the ways in which it ends."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from selfsup_jax.devices.link import Link, Loss
from selfsup_jax.devices.wire import LOOPBACK
from selfsup_jax.errors import UserError

_SAVED = "the same command on every host goes on from what is saved"


class Job:
    """The job that this process is part of; the processes find each other through `link`.

    Attributes:
        step: where this process is, None before the first.
        saved: tells what is saved, in words for the last line.
        agrees: True while SIGTERM ends all hosts after the same step, see `reached_preemption`.
        sigterm: True once SIGTERM was received.
    """

    def __init__(self, process: int, processes: int, host_timeout: float):
        self.step: int | None = None
        self.saved: Callable[[], str] = lambda: _SAVED
        self.agrees = self.sigterm = False
        self.link = Link(process, processes, host_timeout, self._lost)
        self._tell_jax: Callable[[int], Any] | None = None

    def start(
        self, address: str, start_timeout: float, local_devices: Sequence[int] | None
    ) -> None:
        """Joins the other processes, and starts `jax.distributed`."""
        link = self.link
        local = link.join(*parse_address(address), start_timeout)
        _no_proxy_for_loopback()
        jax.distributed.initialize(
            local.coordinator,
            link.processes,
            link.process,
            local_device_ids=local_devices,
            coordinator_bind_address=local.bind,
            # Ours is shorter, and ends a process with one line.
            heartbeat_timeout_seconds=int(100 + 4 * link.timeout),
        )
        if threading.current_thread() is threading.main_thread():
            self._watch_sigterm()

    # ------------------------------------------------------------------------ how it ends

    def _lost(self, loss: Loss) -> None:
        line = loss.line
        if not loss.told:
            where = "" if self.step is None else f", at step {self.step:,}"
            line += f"{where}; {self.saved()}"
            self.link.end(loss.status, line)
        leave(loss.status, line)

    def wait_if_lost(self, error: BaseException) -> None:
        """If the error may be that of a collective, waits until it is known if a process is lost.

        If one is, this process ends here, with one line about that.
        """
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if not all(isinstance(e, (UserError, OSError)) for e in causes):
            self.link.wait_for_signs_of_life()

    # ---------------------------------------------------------------------------- SIGTERM

    def _watch_sigterm(self) -> None:
        """Acts on SIGTERM at once, also while the main thread is in a computation or waits.

        `jax.distributed` catches the signal for `reached_preemption`. Where nothing calls that, as
        in evaluation, the signal would have no effect.
        """
        self._tell_jax = _handler(signal.SIGTERM)
        ours, interpreters = socket.socketpair()
        for end in (ours, interpreters):
            end.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(interpreters.fileno(), warn_on_full_buffer=False)
        self._sockets = (ours, interpreters)

        def received() -> None:
            if signal.SIGTERM in ours.recv(4096):
                self._terminate()

        self.link.loop.call_soon_threadsafe(self.link.loop.add_reader, ours, received)

    def _terminate(self) -> None:
        self.sigterm = True
        if self.agrees and self._tell_jax is not None:
            self._tell_jax(signal.SIGTERM)
        else:
            threading.Thread(target=self.stop_now).start()  # not the thread of the link

    def stop_now(self) -> NoReturn:
        """Ends this process and the others at once, as SIGTERM does where no step can be saved."""
        status = 128 + signal.SIGTERM
        line = f"SIGTERM: stopped; {self.saved()}"
        self.link.end(status, line)
        leave(status, line)


def leave(status: int, line: str) -> NoReturn:
    """Ends the process with one line, whatever its other threads wait for."""
    prefix = "error: " if status < 128 else ""
    newline = "\n" if sys.stderr.isatty() else ""  # below the progress line
    # One write: the main thread may print at the same time.
    os.write(2, f"{newline}{prefix}{line}\n".encode())
    os._exit(status)


def parse_address(address: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as host and port.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(?:\[([\w:.%]+)\]|([\w.-]+)):(\d{1,5})", address, re.ASCII)
    port = int(match[3]) if match else 0
    if match is None or not 0 < port < 2**16:
        raise UserError(
            f"--coordinator_address={address!r}: must be HOST:PORT of process 0, such as "
            "10.0.0.1:1234, with a port from 1 to 65535"
        )
    return match[1] or match[2], port


def _no_proxy_for_loopback() -> None:
    """So that gRPC, with an HTTP proxy in the environment, connects to this machine directly."""
    if any(name in os.environ for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        variable = "no_grpc_proxy"  # it takes the place of `no_proxy`
        others = os.environ.get(variable, os.environ.get("no_proxy", ""))
        os.environ[variable] = ",".join(filter(None, [LOOPBACK, others]))


def _handler(number: int) -> Callable[[int], Any] | None:
    """The C function that handles a signal, if there is one: the first field of `sigaction`."""
    action = ctypes.create_string_buffer(1024)
    if os.name != "posix" or ctypes.CDLL(None).sigaction(number, None, action):
        return None
    address = ctypes.cast(action, ctypes.POINTER(ctypes.c_void_p))[0]
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address and address > 1 else None
