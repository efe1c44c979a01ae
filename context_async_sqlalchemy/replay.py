"""A request that can be given to the application again."""

from __future__ import annotations

import asyncio
from typing import Any

from context_async_sqlalchemy.asgi_types import Message, Receive, Scope


class ReplayableRequest:
    """A request that keeps its scope and its body, to begin again with.

    Args:
        scope: Its ASGI scope.
        receive: The server's `receive`.
        body_limit: How many bytes of its body to keep.

    Attributes:
        obstacle: Why it cannot be given to the application again; None if it can.
    """

    def __init__(self, scope: Scope, receive: Receive, body_limit: int) -> None:
        self.obstacle: str | None = None
        self._scope = scope
        self._items = dict(scope)
        self._contents = {key: _copy(value) for key, value in scope.items() if _is_mutable(value)}
        self._receive = receive
        self._body_limit = body_limit
        self._size = 0
        self._is_complete = False
        self._messages: list[Message] = []
        self._read = 0
        self._receiving: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        """Return the next message; after `rewind`, the kept messages come first."""
        if self._read == len(self._messages):
            return await self._receive_next()
        self._read += 1
        return dict(self._messages[self._read - 1])

    async def has_ended(self) -> bool:
        """Return whether there is an obstacle; look first whether the client has left."""
        while self.obstacle is None:
            was_complete = self._is_complete
            if self._receiving is None:
                self._receiving = asyncio.ensure_future(self._receive())
            # It is not cancelled: a chunk of the body, which it is about to return, would be lost.
            await asyncio.wait([self._receiving], timeout=_MOMENT)
            if not self._receiving.done():
                break
            try:
                await self._receive_next()
            except Exception as error:
                self.obstacle = f"its body cannot be read ({type(error).__name__})"
            if was_complete:  # and yet the server has more to say: it is no disconnect
                break
        return self.obstacle is not None

    def rewind(self) -> None:
        """Let the application begin again, with the scope and the body as they came."""
        self._read = 0
        # In place: an outer middleware may hold the scope, or the state in it, and look there for
        # what the application has put.
        self._scope.clear()
        self._scope.update(self._items)
        for key, content in self._contents.items():
            value = self._scope[key]
            value.clear()
            if isinstance(content, dict):
                value.update(content)
            else:
                value.extend(content)

    async def close(self) -> None:
        """Leave no task."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])

    async def _receive_next(self) -> Message:
        try:
            message = await self._next_message()
        except asyncio.CancelledError:
            if not self._is_complete:
                self.obstacle = "the application has cancelled the reading of its body"
            raise
        if message["type"] == "http.disconnect":
            self.obstacle = "the client has left"
        elif message["type"] == "http.request":
            self._is_complete = not message.get("more_body", False)
            self._size += len(message.get("body", b""))
            if self._size > self._body_limit:
                self.obstacle = f"its body is larger than {self._body_limit} bytes"
                self._messages.clear()
                self._read = 0
            else:
                self._messages.append(dict(message))
                self._read += 1
        return message

    async def _next_message(self) -> Message:
        if self._receiving is None:
            return await self._receive()
        await asyncio.wait([self._receiving])
        receiving, self._receiving = self._receiving, None
        return receiving.result()


_MOMENT = 0.001
"""How many seconds a server has to say that the client has left."""


def _copy(value: dict[Any, Any] | list[Any]) -> dict[Any, Any] | list[Any]:
    return dict(value) if isinstance(value, dict) else list(value)


def _is_mutable(value: object) -> bool:
    return isinstance(value, dict | list)
