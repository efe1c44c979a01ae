"""The members of each room, and the delivery of messages to them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from starlette.websockets import WebSocket

SLOW = 10  # seconds after which a client that does not read is dropped

Outbox: TypeAlias = asyncio.Queue[dict[str, Any]]

members: dict[str, set[Outbox]] = {}


@contextmanager
def joined(room: str) -> Iterator[Outbox]:
    """Join a room for the block; yield the queue of events for the client."""
    outbox: Outbox = asyncio.Queue()
    members.setdefault(room, set()).add(outbox)
    try:
        yield outbox
    finally:
        members[room].remove(outbox)
        if not members[room]:
            del members[room]


def broadcast(room: str, event: dict[str, Any]) -> None:
    """Queue an event for everyone in a room; never waits, because the commit waits for it."""
    for outbox in members.get(room, ()):
        outbox.put_nowait(event)


async def deliver(outbox: Outbox, websocket: WebSocket) -> None:
    """Send queued events in order, until cancelled.

    Raises:
        TimeoutError: If the client does not read.
    """
    while True:
        event = await outbox.get()
        async with asyncio.timeout(SLOW):
            await websocket.send_json(event)
