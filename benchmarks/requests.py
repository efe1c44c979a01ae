"""Send requests to an application in this process, without a server."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

from context_async_sqlalchemy.asgi_types import ASGIApp


async def request(app: ASGIApp, path: str) -> bytes:
    """Send a request; return the body of its response, which has to be a 200."""
    messages: list[Any] = []
    received = False

    async def receive() -> dict[str, Any]:
        nonlocal received
        if received:  # a server has no more to say until the client leaves
            await asyncio.get_running_loop().create_future()
        received = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    await app(scope, receive, send)
    assert messages[0]["status"] == 200, (path, messages)
    body: bytes = b"".join(message["body"] for message in messages[1:])
    return body


async def measure(app: ASGIApp, path: str, requests: int) -> tuple[float, float]:
    """Send requests one after the other; return the CPU and wall time of one, in µs."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(requests):
        await request(app, path)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / requests * 1e6, wall / requests * 1e6
