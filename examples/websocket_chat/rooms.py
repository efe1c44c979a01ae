"""The members of each room, and the delivery of messages to them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from starlette.websockets import WebSocket

SLOW = 10  # seconds after which a client that does not read is dropped
UNREAD = 100  # events that wait for a client; with one more it is dropped

Outbox: TypeAlias = asyncio.Queue[
    dict[str, Any] | None
]  # None: nothing follows

members: dict[str, set[Outbox]] = {}


@contextmanager
def joined(room: str) -> Iterator[Outbox]:
    """Join a room for the block; yield the queue of events for the client."""
    outbox: Outbox = asyncio.Queue(UNREAD)
    members.setdefault(room, set()).add(outbox)
    try:
        yield outbox
    finally:
        leave(room, outbox)


def leave(room: str, outbox: Outbox) -> None:
    """Leave a room; harmless if that has happened."""
    if room in members:
        members[room].discard(outbox)
        if not members[room]:
            del members[room]


def broadcast(room: str, event: dict[str, Any]) -> None:
    """Queue an event for everyone in a room; never waits, because the commit waits for it."""
    for outbox in list(members.get(room, ())):
        if (
            outbox.full()
        ):  # to leave an event out would be a gap that nobody sees
            leave(room, outbox)
            while not outbox.empty():
                outbox.get_nowait()
            outbox.put_nowait(None)
        else:
            outbox.put_nowait(event)


async def deliver(outbox: Outbox, websocket: WebSocket) -> None:
    """Send queued events in order, until cancelled.

    Raises:
        TimeoutError: If the client does not read, or not fast enough.
    """
    while (event := await outbox.get()) is not None:
        async with asyncio.timeout(SLOW):
            await websocket.send_json(event)
    raise TimeoutError("more happened than the client has read")
