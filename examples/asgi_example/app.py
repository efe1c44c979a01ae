"""The application: a function, and the middleware around it."""

import traceback
from contextlib import AsyncExitStack

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from examples.asgi_example.routes import respond
from examples.workflows.database import lifespan


def setup_app() -> ASGIApp:
    return ASGIHTTPDBSessionMiddleware(application)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await live(receive, send)
    elif scope["type"] == "http":
        await respond(scope, send)


async def live(receive: Receive, send: Send) -> None:
    """Follow https://asgi.readthedocs.io/en/latest/specs/lifespan.html."""
    async with AsyncExitStack() as stack:
        await receive()
        try:
            await stack.enter_async_context(lifespan(application))
        except Exception:
            await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})


app = setup_app()
