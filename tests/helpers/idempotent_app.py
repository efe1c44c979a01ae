"""An application with idempotency keys that kills its own process at a step of a request.

The environment variable `SERVED_DATABASE_URL` names its database, and `KILLED` the step.
"""

from __future__ import annotations

import os
import signal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.starlette_utils import database_lifespan
from tests.helpers.asgi import add
from tests.helpers.idempotency import with_keys


def make_app(url: str) -> ASGIApp:
    """Make the application for a database."""
    connect = DBConnect.from_url(url)

    async def create(request: Request) -> Response:
        name = (await request.body()).decode()
        await add(connect, name)
        be_killed("in the handler")
        return Response(f"made {name}", 201)

    routes = [Route("/", create, methods=["POST"])]
    starlette = Starlette(routes=routes, lifespan=database_lifespan(connect))
    keyed = with_keys(starlette, connect, {"before_commit": lambda _: be_killed("before COMMIT")})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                be_killed("after COMMIT")
            await send(message)

        await keyed(scope, receive, send_on)

    return app


def be_killed(step: str) -> None:
    """End this process as nothing can survive it, if this is the step."""
    if os.environ.get("KILLED") == step:
        os.kill(os.getpid(), signal.SIGKILL)


app = make_app(os.environ.get("SERVED_DATABASE_URL", "sqlite://"))
