"""Pure ASGI applications with the middleware, and calls of them without a server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from tests.helpers.models import Item

Handler = Callable[[Scope], Awaitable[int]]


async def add(connect: DBConnect, *names: str) -> AsyncSession:
    session = await db_session(connect)
    await session.execute(insert(Item), [{"name": name} for name in names])
    return session


async def respond(send: Send, status: int = 200, body: bytes = b"") -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def app_of(handler: Handler, **options: Any) -> ASGIApp:
    """Make an application that answers with the status that `handler` returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await respond(send, await handler(scope))

    return ASGIHTTPDBSessionMiddleware(app, **options)


def http_scope(path: str = "/") -> Scope:
    return {"type": "http", "method": "GET", "path": path, "headers": []}


async def call(app: ASGIApp, scope: Scope | None = None) -> list[Message]:
    """Call `app` without a server; return what it sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope or http_scope(), receive, send)
    return sent
