"""Who is spared the look at what the application hands over, and who is not."""

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy._http.hand_over import HandOver
from context_async_sqlalchemy.asgi_types import Message, Receive, Scope, Send
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import add, call
from tests.helpers.database import Database
from tests.helpers.late_start import Holding


class Handling(ExceptionMiddleware):
    """What may do anything with the messages, though its base does not."""


async def answer(_: Request) -> Response:
    return Response()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[HandOver]:
    looks: list[HandOver] = []
    look = HandOver.__call__

    async def note_and_look(self: HandOver, *args: Any) -> None:
        looks.append(self)
        await look(self, *args)

    monkeypatch.setattr(HandOver, "__call__", note_and_look)
    return looks


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
async def test_nothing_is_looked_at_inside_the_layers_that_pass_messages_on_at_once(
    kind: type[Starlette], looks: list[HandOver]
) -> None:
    app = kind(routes=[Route("/", answer)])
    add_starlette_http_db_session_middleware(app)
    await call(app)
    assert looks == []


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
@pytest.mark.parametrize("layer", [Holding, Handling])
async def test_inside_any_other_layer_the_start_of_the_response_is_seen(
    kind: type[Starlette], layer: Any, looks: list[HandOver]
) -> None:
    app = kind(routes=[Route("/", answer)], middleware=[Middleware(layer)])
    add_starlette_http_db_session_middleware(app)  # the outermost
    await call(app)
    assert len(looks) == 1


@pytest.mark.parametrize(
    "route",
    [
        Mount("/", Router([Route("/", answer)], middleware=[Middleware(Holding)])),
        Mount("/", Starlette(routes=[Route("/", answer)], middleware=[Middleware(Holding)])),
        Route("/", answer, middleware=[Middleware(Holding)]),
    ],
    ids=["router", "application", "route"],
)
async def test_so_it_is_inside_the_middlewares_of_what_a_router_leads_to(
    route: Any, looks: list[HandOver]
) -> None:
    app = Starlette(routes=[route])
    add_starlette_http_db_session_middleware(app)
    await call(app)
    assert len(looks) == 1


@pytest.mark.parametrize("status", [204, 304])
async def test_a_status_without_a_body_is_settled_when_it_is_sent(
    connect: DBConnect, database: Database, status: int
) -> None:
    class Refusing(Holding):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def send_on(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["status"] = 500
                await send(message)

            await super().__call__(scope, receive, send_on)

    async def write(_: Request) -> Response:
        await add(connect, "a")
        return Response(status_code=status)

    app = Starlette(routes=[Route("/", write)], middleware=[Middleware(Refusing)])
    add_starlette_http_db_session_middleware(app)
    start, *_ = await call(app)
    assert start["status"] == 500
    assert await database.names() == []
