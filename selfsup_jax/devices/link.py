"""The connection of each process with all others of its job: joining, agreeing, noticing a loss.

It is of plain sockets, in a thread of its own, so that it works before JAX is started and while a
collective waits for a process that is gone. It takes the coordinator's port; JAX's own connections
go through it, see `wire.pipe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from selfsup_jax.devices import wire
from selfsup_jax.devices.activity import Activity
from selfsup_jax.devices.hub import Hub
from selfsup_jax.devices.wire import Message
from selfsup_jax.errors import LOST, UserError

_GRACE = 5.0  # seconds that another process's word may take


class Loss(NamedTuple):
    """Why this process has to end: another one is gone, or has ended.

    Attributes:
        status: the exit status: `LOST`, or that of a process that ended by itself.
        line: one line about it.
        told: whether the line is another process's own, which says all.
    """

    status: int
    line: str
    told: bool


class Addresses(NamedTuple):
    """The arguments of `jax.distributed.initialize`."""

    coordinator: str
    bind: str | None  # on process 0


class Link:
    """One process's end of it.

    Args:
        process, processes: which of how many this is.
        timeout: seconds without a sign of life after which another process is lost.
        on_loss: called once, in a thread of its own, if the job can't go on.
    """

    def __init__(
        self, process: int, processes: int, timeout: float, on_loss: Callable[[Loss], None]
    ):
        self.process, self.processes, self.timeout = process, processes, timeout
        self.loop = asyncio.new_event_loop()
        self._on_loss: Callable[[Loss], None] | None = on_loss
        self._names: dict[int, str] = {}
        self._missing = [p for p in range(processes) if p != process]
        self._started: asyncio.Future[None] = self.loop.create_future()
        self._all_done: asyncio.Future[None] = self.loop.create_future()
        self._rounds: dict[str, asyncio.Future[dict[str, list[int]]]] = {}
        self._pulse = wire.Pulse(timeout)
        self.activity = Activity(self._pulse.interval)
        self._tasks: list[asyncio.Task[None]] = []
        self._all_heard_at = 0.0  # every process was alive then
        self._send: Callable[[Message], None] = lambda message: None
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self.loop.run_forever, name="hosts", daemon=True)
        self._thread.start()

    def _wait(self, what: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(timeout)

    # ------------------------------------------------------------------------ the start

    def join(self, host: str, port: int, seconds: float) -> Addresses:
        """Joins the others, within so many seconds.

        Raises:
            UserError: process 0 can't be reached, processes are missing, the port is taken, or
                another process has this one's number.
        """
        return self._wait(self._join(host, port, seconds))

    async def _join(self, host: str, port: int, seconds: float) -> Addresses:
        deadline = time.monotonic() + seconds
        if self.process == 0:
            inner = wire.free_port()
            await self._serve(port, inner)
            local = f"{wire.LOOPBACK}:{inner}"
            addresses = Addresses(local, local)
        else:
            await self._connect(host, port, deadline, seconds)
            forward = functools.partial(self._forward, host, port)
            server = await asyncio.start_server(forward, wire.LOOPBACK, 0)
            self._servers.append(server)
            addresses = Addresses(f"{wire.LOOPBACK}:{server.sockets[0].getsockname()[1]}", None)
        await asyncio.wait([self._started], timeout=max(0.0, deadline - time.monotonic()))
        if not self._started.done():
            raise UserError(
                f"{members(self._missing)} of {self.processes} did not start within "
                f"--start_timeout={seconds:g} s: start the same command with each --process_id "
                f"from 0 to {self.processes - 1}"
            )
        self._started.result()
        return addresses

    async def _serve(self, port: int, jax_port: int) -> None:
        try:
            listener = wire.listen(port)
        except OSError as e:
            raise UserError(
                f"port {port} of this machine can't be used for the other processes: {_reason(e)}; "
                "if an earlier job still runs, stop it, or give another port in "
                "--coordinator_address"
            ) from e
        hub = Hub(self.processes, self.timeout, jax_port)
        self._servers.append(await hub.serve(listener))
        self._tasks.append(asyncio.create_task(hub.watch()))
        self._send = functools.partial(hub.receive, 0)
        hub.join(self._hello(), self._receive)
        self._tasks.append(asyncio.create_task(self._beat()))

    def _hello(self) -> Message:
        return {
            "kind": "hello",
            "process": self.process,
            "processes": self.processes,
            "name": platform.node(),
        }

    async def _connect(self, host: str, port: int, deadline: float, seconds: float) -> None:
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                connecting = asyncio.open_connection(host, port, limit=wire.LIMIT)
                reader, writer = await asyncio.wait_for(connecting, left)
                writer.write(wire.encode(self._hello()))
                first = await asyncio.wait_for(wire.read(reader), min(left, _GRACE))
                if first is not None:
                    break
                writer.close()
                reason = "what listens there is not process 0 of this job"
            except OSError as e:  # also a name that is not known, and a timeout
                reason = _reason(e)
            if time.monotonic() >= deadline:
                raise UserError(
                    f"process 0 can't be reached at {host}:{port} (--coordinator_address) within "
                    f"--start_timeout={seconds:g} s: {reason}"
                )
            await asyncio.sleep(min(0.3, max(0.0, deadline - time.monotonic())))
        self._send = lambda message: writer.write(wire.encode(message))
        self._pulse.heard(0)
        self._receive(first)
        self._tasks.append(asyncio.create_task(self._listen(reader, writer)))
        self._tasks.append(asyncio.create_task(self._beat()))

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while (message := await wire.read(reader)) is not None:
                self._pulse.heard(0)
                self._receive(message)
        self._lose(0, "has died: its connection closed")

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._send({"kind": "beat", "activity": self.activity.report()})
            if self._pulse.silent():
                self._lose(0, f"has given no sign of life for {self.timeout:g} s")
            await asyncio.sleep(self._pulse.interval)

    async def _forward(
        self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Connects this process's JAX client with the service of process 0."""
        with contextlib.closing(writer):
            with contextlib.suppress(OSError):
                remote = await asyncio.open_connection(host, port)
                remote[1].write(wire.encode({"kind": "jax"}))
                await wire.join(reader, writer, *remote)
            await asyncio.Event().wait()  # the local side stays open until this task is cancelled

    # --------------------------------------------------------------------- what is received

    def _receive(self, message: Message) -> None:
        kind = message.get("kind")
        if kind == "waiting":
            self._missing = message["missing"]
        elif kind == "refused":
            self._started.set_exception(UserError(message["line"]))
        elif kind == "start":
            self._names = dict(message["names"])
            self._started.set_result(None)
        elif kind == "exchanged":
            self._round(message["round"]).set_result(message["groups"])
        elif kind == "beat":
            self._all_heard_at = time.monotonic() - message["quiet"]
        elif kind == "done":
            self._all_done.set_result(None)
        elif kind == "lost":
            self._lose(message["process"], message["why"])
        elif kind == "ended":
            line = f"{self.named(message['process'])}: {message['line']}"
            self._stop(Loss(message["status"], line, told=True))

    def _lose(self, process: int, why: str) -> None:
        if not self._started.done():
            line = "has ended before all processes had started"
            self._started.set_exception(UserError(f"{self.named(process)} {line}"))
        elif self._started.exception() is None and not self._all_done.done():
            self._stop(Loss(LOST, f"{self.named(process)} {why}", told=False))

    def _stop(self, loss: Loss) -> None:
        on_loss, self._on_loss = self._on_loss, None
        if on_loss is not None:
            threading.Thread(target=on_loss, args=(loss,)).start()

    def named(self, process: int) -> str:
        """`process 3 of 8 (its machine)`."""
        name = f" ({self._names[process]})" if process in self._names else ""
        return f"process {process} of {self.processes}{name}"

    def _round(self, name: str) -> asyncio.Future[dict[str, list[int]]]:
        return self._rounds.setdefault(name, self.loop.create_future())

    # -------------------------------------------------------------------- what all do together

    def exchange(self, name: str, value: Any) -> list[tuple[Any, list[int]]]:
        """What all processes give under this name: each value, and who gave it.

        Waits for all of them, however long it takes. The value must be JSON.
        """

        async def give() -> dict[str, list[int]]:
            text = json.dumps(value, sort_keys=True)
            self._send({"kind": "give", "round": name, "value": text})
            return await self._round(name)

        groups = self._wait(give())
        self._rounds.pop(name)
        return [(json.loads(text), processes) for text, processes in groups.items()]

    def end(self, status: int, line: str) -> None:
        """Tells the others that this process ends, and why; they end too, with this line."""

        async def tell() -> None:
            self._on_loss = None
            self._send({"kind": "ended", "status": status, "line": line})
            await asyncio.sleep(0.2)  # let the sockets send

        if not self._all_done.done():
            with contextlib.suppress(Exception):
                self._wait(tell(), _GRACE)

    def wait_for_signs_of_life(self) -> None:
        """Waits until all processes are known to be alive now, or until this one ends at a loss."""
        now = time.monotonic()
        while self._all_heard_at <= now and self._on_loss is not None:
            time.sleep(0.1)
        time.sleep(1.0)  # for what `on_loss` does

    def finish(self) -> None:
        """Waits until all processes have come here: then none needs another any more."""

        async def done() -> None:
            self._send({"kind": "done"})
            await asyncio.wait([self._all_done])
            await asyncio.sleep(0.2 if self.process == 0 else 0.0)  # let the sockets send

        self._wait(done())

    def close(self) -> None:
        """Closes all connections and ends the thread."""

        async def cancel() -> None:
            self._on_loss = None
            for server in self._servers:
                server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # the transports close

        self._wait(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _reason(e: OSError) -> str:
    """The system's words; asyncio adds its own to some errors."""
    if e.errno is not None and e.errno > 0:
        return os.strerror(e.errno)
    return e.strerror or str(e) or "no answer"


def members(processes: list[int]) -> str:
    """`process 3`, or `processes 1, 2 and 3`."""
    if len(processes) == 1:
        return f"process {processes[0]}"
    return f"processes {', '.join(map(str, processes[:-1]))} and {processes[-1]}"
