"""Who is in which room, and gets what is said there."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from starlette.websockets import WebSocket

SLOW = 10  # seconds after which a client that does not read is given up

Outbox: TypeAlias = asyncio.Queue[dict[str, Any]]

members: dict[str, set[Outbox]] = {}


@contextmanager
def joined(room: str) -> Iterator[Outbox]:
    """Be in a room for a block; yields what is to be sent to the client."""
    outbox: Outbox = asyncio.Queue()
    members.setdefault(room, set()).add(outbox)
    try:
        yield outbox
    finally:
        members[room].remove(outbox)
        if not members[room]:
            del members[room]


def broadcast(room: str, event: dict[str, Any]) -> None:
    """Tell everybody in a room; waits for nobody, for a commit waits for its callbacks."""
    for outbox in members.get(room, ()):
        outbox.put_nowait(event)


async def deliver(outbox: Outbox, websocket: WebSocket) -> None:
    """Send what comes, one after another, until cancelled.

    Raises:
        TimeoutError: If the client does not read.
    """
    while True:
        event = await outbox.get()
        async with asyncio.timeout(SLOW):
            await websocket.send_json(event)
