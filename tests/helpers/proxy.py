"""A proxy in front of PostgreSQL that sees every round trip, and can make it fail.

It speaks version 3 of the wire protocol:
https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum

TASK_NAME = "proxy"

_SSL_REQUEST, _CANCEL_REQUEST = 80877103, 80877102
_ENDS_OF_BATCH = (b"S", b"Q", b"H", b"X")  # Sync, Query, Flush, Terminate
_ENDS_OF_REPLY = (b"Z", b"T", b"n")  # ReadyForQuery; RowDescription, NoData after a Flush


class Fault(Enum):
    """How a round trip fails."""

    ERROR = "the server answers with an error: nothing is done, and its transaction has failed"
    LOST_BEFORE = "the connection is lost before the server has heard of it"
    LOST_AFTER = "the connection is lost after the server has done it"


@dataclass(frozen=True)
class Call:
    """A round trip.

    Attributes:
        statement: The SQL text; "connect" for a new connection.
        pid: The server process of the connection; 0 for a new one.
        begin: What is run before the statement in the same round trip, if that is a BEGIN.
    """

    statement: str
    pid: int
    begin: str = ""


Decide = Callable[[Call], Awaitable[Fault | None]]


@asynccontextmanager
async def proxy(
    host: str, port: int, decide: Decide, with_set_up: bool = False
) -> AsyncGenerator[int]:
    """Run a proxy to the server on `host` and `port`.

    Args:
        host: The server's host.
        port: The server's port.
        decide: Awaited before each round trip; returns how it fails, or None.
        with_set_up: Whether to include round trips before the first BEGIN of a connection.

    Yields:
        The port of the proxy, on 127.0.0.1.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.set_name(TASK_NAME)
        tasks.add(task)
        try:
            # Python 3.11 logs a cancelled connection handler as an error.
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await _Connection(reader, writer, decide, with_set_up).run(host, port)
        finally:
            writer.transport.abort()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One connection through the proxy."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decide: Decide,
        is_set_up: bool,
    ) -> None:
        self._client_reader, self._client_writer = reader, writer
        self._decide = decide
        self._pid = 0
        self._statements: dict[bytes, str] = {}
        self._lost_after: tuple[bytes, ...] = ()
        self._swallows = False
        self._is_set_up = is_set_up

    async def run(self, host: str, port: int) -> None:
        startup = await self._read_startup()
        if _code_of(startup) == _SSL_REQUEST:
            self._client_writer.write(b"N")
            startup = await self._read_startup()
        is_cancel = _code_of(startup) == _CANCEL_REQUEST
        if not is_cancel and await self._decide(Call("connect", 0)) is not None:
            return
        server_reader, server_writer = await asyncio.open_connection(host, port)
        server_writer.write(startup)
        pumps = [
            asyncio.create_task(self._pump_replies(server_reader), name=TASK_NAME),
            asyncio.create_task(self._pump_calls(server_writer), name=TASK_NAME),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server_writer.transport.abort()  # first: this may be cancelled while it waits
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _read_startup(self) -> bytes:
        length = await self._client_reader.readexactly(4)
        return length + await self._client_reader.readexactly(struct.unpack("!I", length)[0] - 4)

    async def _pump_calls(self, server: asyncio.StreamWriter) -> None:
        batch, statement, begin = b"", "", ""
        while True:
            kind, message = await _read_message(self._client_reader)
            batch += message
            statement = self._statement_of(kind, message) or statement
            if kind == b"E" and statement.startswith(("BEGIN", "SELECT pg_catalog.set_config")):
                begin += f"{statement};"
            if kind not in _ENDS_OF_BATCH:
                continue
            # Some versions of asyncpg query types as they connect. If that fails, SQLAlchemy leaves
            # the connection to the garbage collector; no other code sees it.
            self._is_set_up = self._is_set_up or "BEGIN" in (statement[:5], begin[:5])
            # A Sync by itself only ends an earlier failure.
            is_sync = kind == b"S" and len(batch) == len(message)
            is_call = self._is_set_up and kind != b"X" and not is_sync
            call = Call(statement, self._pid, begin)
            fault = await self._decide(call) if is_call else None
            if fault is Fault.LOST_BEFORE:
                return
            if fault is Fault.ERROR:
                self._answer_with_error(call, server, flushed=kind == b"H")
            else:
                if fault is Fault.LOST_AFTER:
                    self._lost_after = _ENDS_OF_REPLY
                server.write(batch)
                await server.drain()
            batch, statement, begin = b"", "", ""

    async def _pump_replies(self, server: asyncio.StreamReader) -> None:
        while True:
            kind, message = await _read_message(server)
            if kind == b"K":  # BackendKeyData
                self._pid = struct.unpack("!I", message[5:9])[0]
            if self._lost_after:
                if kind in self._lost_after:
                    return
            elif self._swallows:
                self._swallows = kind != b"Z"
            else:
                self._client_writer.write(message)
                await self._client_writer.drain()

    def _statement_of(self, kind: bytes, message: bytes) -> str | None:
        if kind == b"Q":
            return message[5:-1].decode()
        if kind == b"P":  # Parse: name, statement
            name, statement, _ = message[5:].split(b"\0", 2)
            self._statements[name] = statement.decode()
            return self._statements[name]
        if kind == b"B":  # Bind: portal, name of the statement
            return self._statements.get(message[5:].split(b"\0", 2)[1])
        return None

    def _answer_with_error(
        self, call: Call, server: asyncio.StreamWriter, *, flushed: bool
    ) -> None:
        statement = call.statement
        fields = b"SERROR\0VERROR\0C40001\0Minjected\0\0"
        self._client_writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
        if not statement.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
            # The transaction has to fail there, too.
            self._run_unseen(f"{call.begin}SELECT 1 / 0".encode(), server)
        if flushed:
            return
        status = b"E"
        if statement.startswith(("BEGIN", "COMMIT")):
            status = b"I"
        if statement.startswith("COMMIT"):
            # The server has to roll back, as after a constraint that fails at COMMIT.
            self._run_unseen(b"ROLLBACK", server)
        self._client_writer.write(b"Z" + struct.pack("!I", 5) + status)

    def _run_unseen(self, statement: bytes, server: asyncio.StreamWriter) -> None:
        self._swallows = True
        message = statement + b"\0"
        server.write(b"Q" + struct.pack("!I", len(message) + 4) + message)


def _code_of(startup: bytes) -> int:
    code: int = struct.unpack("!I", startup[4:8])[0]
    return code


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    header = await reader.readexactly(5)
    return header[:1], header + await reader.readexactly(struct.unpack("!I", header[1:])[0] - 4)
