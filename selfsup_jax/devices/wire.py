"""What the processes of a job send each other: lines of JSON, and JAX's own connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

Message = dict[str, Any]

LIMIT = 2**26  # bytes of a line
LOOPBACK = "127.0.0.1"


def encode(message: Message) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


async def read(reader: asyncio.StreamReader) -> Message | None:
    """The next message, or None at the end of the connection and after anything but a message."""
    try:
        message = json.loads(await reader.readline())
    except (OSError, ValueError, RecursionError):  # also a line above the limit
        return None
    return message if isinstance(message, dict) else None


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies bytes until one side is gone, and leaves the other side open.

    JAX's client aborts the process with a hundred lines when it sees the end of its connection.
    Here it sees silence, and `Link` ends the process with one line.
    """
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


async def join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    other_reader: asyncio.StreamReader,
    other_writer: asyncio.StreamWriter,
) -> None:
    """Joins two connections with `pipe`, both ways; the second is closed in the end."""
    with contextlib.closing(other_writer):
        await asyncio.gather(pipe(reader, other_writer), pipe(other_reader, writer))


def listen(port: int) -> socket.socket:
    """A socket that listens on all of this machine's addresses, as JAX's own service.

    Raises:
        OSError: another process listens there.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


class Pulse:
    """Notices who has not been heard for too long.

    `silent` is called every `interval` seconds. If it is called late, this process was paused
    itself: the messages of that time are still to be read, and are not held against the others.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(5.0, timeout / 5)
        self._heard: dict[int, float] = {}
        self._checked = time.monotonic()

    def heard(self, process: int) -> None:
        """Notes a sign of life."""
        self._heard[process] = time.monotonic()

    def forget(self, process: int) -> None:
        """The process is not watched any more."""
        self._heard.pop(process, None)

    def quiet(self) -> float:
        """Seconds since the last sign of life of the process that was heard longest ago."""
        return max((time.monotonic() - at for at in self._heard.values()), default=0.0)

    def silent(self) -> list[int]:
        """The processes without a sign of life for `timeout` seconds."""
        now = time.monotonic()
        paused = now - self._checked > 2 * self.interval + 1
        self._checked = now
        if paused:
            self._heard = dict.fromkeys(self._heard, now)
        return [process for process, at in self._heard.items() if now - at > self.timeout]
