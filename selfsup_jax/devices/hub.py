"""What process 0 does for all processes of a job: who is there, who has which value."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import defaultdict
from collections.abc import Callable

from selfsup_jax.devices import activity, wire
from selfsup_jax.devices.wire import Message


class Hub:
    """Connects the processes of a job; all calls are from the thread of its event loop.

    Process 0 is a member like the others. Every member is told when all have joined (`start`), what
    all have given in a round (`exchanged`), when all are done (`done`), and when one is lost
    (`lost`) or ends before the others (`ended`).

    Args:
        processes: how many take part.
        timeout: seconds without a sign of life after which a member is lost.
        jax_port: of the loopback interface, where JAX's own service is, or will be.
    """

    def __init__(self, processes: int, timeout: float, jax_port: int):
        self._processes, self._jax_port = processes, jax_port
        self._send: dict[int, Callable[[Message], None]] = {}
        self._names: dict[int, str] = {}
        self._given: dict[str, dict[int, str]] = defaultdict(dict)
        self._reports: dict[int, Message] = {}
        self._done: set[int] = set()
        self._refused: set[str] = set()
        self._started = False
        self._pulse = wire.Pulse(timeout)

    async def serve(self, listener: socket.socket) -> asyncio.Server:
        """Accepts the other processes, in the background."""
        return await asyncio.start_server(self._accept, sock=listener, limit=wire.LIMIT)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            hello = await wire.read(reader) or {}
            if hello.get("kind") == "jax":
                await self._forward(reader, writer)
            elif isinstance(hello.get("process"), int):
                await self._member(hello, reader, writer)
            # else: not one of this job's processes

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connects another process's JAX client with the service of this process."""
        while True:
            try:
                service = await asyncio.open_connection(wire.LOOPBACK, self._jax_port)
                break
            except OSError:  # process 0 is about to start it
                await asyncio.sleep(0.05)
        await wire.join(reader, writer, *service)

    async def _member(
        self, hello: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        process = hello["process"]
        if not self.join(hello, lambda message: writer.write(wire.encode(message))):
            await writer.drain()
            return
        while (message := await wire.read(reader)) is not None:
            self.receive(process, message)
        self._leave(process, "has died: its connection closed")

    def join(self, hello: Message, send: Callable[[Message], None]) -> bool:
        """A process wants to take part; it is told if it can't."""
        process, processes = hello["process"], hello.get("processes")
        line = ""
        if processes != self._processes or not 0 <= process < self._processes:
            line = f"--num_processes={processes}: process 0 has {self._processes}"
        elif process in self._names:
            line = (
                f"--process_id={process}: there is a process {process} already, on "
                f"{self._names[process]}; each needs its own"
            )
        if line:
            send({"kind": "refused", "line": line})
            refused = f"refused process {process} on {hello.get('name')}: {line}"
            if refused not in self._refused:  # a scheduler may start it again and again
                self._refused.add(refused)
                print(refused, file=sys.stderr, flush=True)
            return False
        self._send[process], self._names[process] = send, str(hello.get("name"))
        if process:  # the others notice the loss of process 0 themselves
            self._pulse.heard(process)
        self._started = len(self._names) == self._processes
        self._tell_who_is_there()
        return True

    def _tell_who_is_there(self) -> None:
        if self._started:
            self._broadcast({"kind": "start", "names": list(self._names.items())})
        else:
            missing = [p for p in range(self._processes) if p not in self._names]
            self._broadcast({"kind": "waiting", "missing": missing})

    def receive(self, process: int, message: Message) -> None:
        """A message from a member."""
        if process not in self._send:
            return
        if process and process not in self._done:
            self._pulse.heard(process)
        kind = message.get("kind")
        if kind == "beat":
            if "activity" in message:  # a process of another version sends none
                self._reports[process] = message["activity"]
            self._send[process]({"kind": "beat", "quiet": self._pulse.quiet()})
        elif kind == "give":
            self._give(process, message["round"], message["value"])
        elif kind == "done":
            self._done.add(process)
            self._pulse.forget(process)
            if len(self._done) == self._processes:
                self._broadcast({"kind": "done"})
        elif kind == "ended":
            self._pulse.forget(process)
            self._send.pop(process, None)
            self._broadcast(message | {"process": process})

    def _give(self, process: int, name: str, value: str) -> None:
        given = self._given[name]
        given[process] = value
        if len(given) == self._processes:
            del self._given[name]
            groups: dict[str, list[int]] = defaultdict(list)  # equal values are sent once
            for member in sorted(given):
                groups[given[member]].append(member)
            self._broadcast({"kind": "exchanged", "round": name, "groups": groups})

    def _leave(self, process: int, why: str) -> None:
        """A member is gone; before the start another may come in its place."""
        self._pulse.forget(process)
        if process not in self._send or process in self._done:
            return
        if self._started:  # if it only slept, it reads this too
            self._broadcast({"kind": "lost", "process": process, "why": why})
        del self._send[process]
        if not self._started:
            del self._names[process]
            self._tell_who_is_there()

    async def watch(self) -> None:
        """Notices members that are silent."""
        while True:
            await asyncio.sleep(self._pulse.interval)
            for process in self._pulse.silent():
                self._leave(process, f"has given no sign of life for {self._pulse.timeout:g} s")
            if len(self._reports) == self._processes and not self._done:
                for process in activity.hanging(self._reports, self._pulse.timeout):
                    nothing = f"it has done nothing for {self._pulse.timeout:g} s"
                    self._leave(process, f"hangs: the others wait for it, and {nothing}")

    def _broadcast(self, message: Message) -> None:
        # Process 0 last: it may end with this message.
        for process in sorted(self._send, reverse=True):
            with contextlib.suppress(OSError, RuntimeError):
                self._send[process](message)
