"""Messages of ASGI's extensions, and several tasks that receive."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect
from context_async_sqlalchemy.asgi_types import Message, Receive, Scope, Send
from tests.helpers.asgi import add, http_scope, respond
from tests.helpers.database import Database
from tests.helpers.failures import ConflictError, Failing

START = {"type": "http.response.start", "status": 200, "headers": []}


async def run(app: Any, **options: Any) -> list[Message]:
    """Call an application with the middleware; return what it sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await ASGIHTTPDBSessionMiddleware(app, **options)(http_scope(), receive, send)
    return sent


@pytest.mark.parametrize("other", ["http.response.push", "http.response.debug"])
async def test_a_message_that_is_no_body_does_not_complete_a_response(
    connect: DBConnect, database: Database, other: str
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START)
        await send({"type": other})
        await add(connect, "a")

    await run(app)
    assert await database.names() == []


@pytest.mark.parametrize(
    "body", ["http.response.body", "http.response.pathsend", "http.response.zerocopysend"]
)
async def test_every_kind_of_body_completes_a_response(
    connect: DBConnect, database: Database, body: str
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START)
        await add(connect, "in the body")
        await send({"type": body, "path": "/a", "file": 0})
        assert await database.names() == ["in the body"]
        await add(connect, "after it")

    await run(app)
    assert await database.names() == ["in the body", "after it"]


async def test_trailers_that_were_announced_complete_a_response(
    connect: DBConnect, database: Database
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START | {"trailers": True})
        await send({"type": "http.response.body"})
        await add(connect, "after the body")
        await send({"type": "http.response.trailers", "more_trailers": True})
        assert await database.names() == []
        await send({"type": "http.response.trailers"})
        assert await database.names() == ["after the body"]

    await run(app)


async def test_a_response_whose_trailers_do_not_come_is_not_complete(
    connect: DBConnect, database: Database
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(START | {"trailers": True})
        await add(connect, "in the body")
        await send({"type": "http.response.body"})

    await run(app)
    assert await database.names() == []


@pytest.mark.usefixtures("no_pauses")
async def test_a_debug_message_does_not_end_the_attempts() -> None:
    fail = Failing(2)

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.debug", "info": {}})
        fail()
        await respond(send)

    sent = await run(app, attempts=3)
    assert fail.calls == 3
    assert [message["type"] for message in sent].count("http.response.start") == 1


@pytest.mark.usefixtures("no_pauses")
async def test_an_answer_that_is_held_back_is_so_to_its_end() -> None:
    fail = Failing(1)
    went_on: list[str] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        try:
            fail()
        except ConflictError:
            await send(START | {"status": 503})
            await send({"type": "http.response.push"})
            went_on.append("to the body")
            await send({"type": "http.response.body"})
            went_on.append("too far")
        else:
            await respond(send)

    sent = await run(app, attempts=2)
    assert [message.get("status") for message in sent] == [200, None]
    assert went_on == ["to the body"]


@pytest.mark.usefixtures("no_pauses")
async def test_two_tasks_may_receive_after_a_retry() -> None:
    fail = Failing(1)
    left = asyncio.Event()
    messages: list[Message] = [{"type": "http.request"}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        fail()
        watching = [asyncio.ensure_future(receive()) for _ in range(2)]
        await asyncio.sleep(0)
        left.set()
        seen = [await task for task in watching]
        assert [message["type"] for message in seen] == ["http.disconnect"] * 2
        await respond(send)

    async def send(_: Message) -> None: ...

    await ASGIHTTPDBSessionMiddleware(app, attempts=2)(http_scope(), receive, send)
    assert fail.calls == 2
