"""Middlewares that pass the start of a response on late: when its body has begun, or is over."""

from __future__ import annotations

from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware

from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send


class Holding:
    """Holds the start back until there is a part of the body, as what sets headers by it does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None

        async def send_late(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                held, start = start, None
                await send(held)
            await send(message)

        await self.app(scope, receive, send_late)


class Buffering:
    """Holds all back until the body is over, as what hashes it does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []

        async def buffer(message: Message) -> None:
            messages.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                for held in messages:
                    await send(held)

        await self.app(scope, receive, buffer)


class Spawning(BaseHTTPMiddleware):
    """Serves the application in another task, from which it takes the response."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


LATE: list[Any] = [Holding, Buffering, Spawning, GZipMiddleware]
