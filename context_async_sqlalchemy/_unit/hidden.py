"""What a server does when it is called by a request is done without the request's context.

It may start the next request of the connection there, which would inherit the context.
"""

from collections.abc import Generator
from contextlib import contextmanager

from context_async_sqlalchemy._unit.context import _context
from context_async_sqlalchemy.asgi_types import Message, Send


async def send_hidden(send: Send, message: Message) -> None:
    """Send the last part of a response: uvicorn then starts a request that is pipelined."""
    token = _context.set(None)
    try:
        await send(message)
    finally:
        _context.reset(token)


@contextmanager
def hidden() -> Generator[None]:
    """Do without the context here in a block."""
    token = _context.set(None)
    try:
        yield
    finally:
        _context.reset(token)
