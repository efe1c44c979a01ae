"""Serve an ASGI application over real HTTP, inside a running event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn


@asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncGenerator[int]:
    """Serve `app` with uvicorn on a free loopback port.

    Args:
        app: The ASGI application.
        **options: Other options of `uvicorn.Config`.

    Yields:
        The port.
    """
    # The socket is already listening: a client that connects before the server has started waits.
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    # asyncio sets this on accepted sockets only if the listener was made with IPPROTO_TCP. Without
    # it, the second part of a response waits 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # By default, uvicorn imports what it finds for WebSockets, even deprecated modules.
    options.setdefault("ws", "none")
    # It sets the level of its loggers process-wide: a server should not inherit another's level.
    options.setdefault("log_level", "warning")
    # Both sides would close an idle connection after 5 seconds, which on a slow machine may be the
    # moment in which the client uses it again.
    options.setdefault("timeout_keep_alive", 60)
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        listener.close()


@asynccontextmanager
async def http_client(app: Any, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve `app` as `serve` does.

    Args:
        app: The ASGI application.
        **options: Other options of `uvicorn.Config`.

    Yields:
        A client of the application, with as many connections as it needs.
    """
    limits = httpx.Limits(max_connections=None, keepalive_expiry=None)
    async with (
        serve(app, **options) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30) as client,
    ):
        yield client
