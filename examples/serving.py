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
        **options: What else `uvicorn.Config` takes.

    Yields:
        The port.
    """
    # The socket listens already: a client that comes before the server has started waits.
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    # asyncio does this for what it accepts only if the listener was made with IPPROTO_TCP; without
    # it, the second part of a response waits for the client to acknowledge the first, for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Left to itself, uvicorn imports what it finds for WebSockets, deprecated modules too.
    options.setdefault("ws", "none")
    # It sets the level of its loggers for the process: a server shall not have that of another.
    options.setdefault("log_level", "warning")
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
        **options: What else `uvicorn.Config` takes.

    Yields:
        A client of the application, with as many connections as it needs.
    """
    limits = httpx.Limits(max_connections=None)
    async with (
        serve(app, **options) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30) as client,
    ):
        yield client
