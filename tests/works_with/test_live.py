"""sse-starlette and python-socketio, with real clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
import socketio
from fastapi import FastAPI
from sqlalchemy import insert
from sse_starlette import EventSourceResponse

from context_async_sqlalchemy import (
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client, serve

ENTRIES = "SELECT text FROM works_with_entry ORDER BY id"


@pytest_asyncio.fixture
async def program(postgresql: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    program = load("works_with.live", postgresql)
    program.outside = Outside(postgresql)
    yield program


@pytest.fixture(params=["websocket", "polling"])
def transport(request: pytest.FixtureRequest) -> str:
    transport: str = request.param
    return transport


@pytest.mark.parametrize("place", ["around", "mounted"])
async def test_an_event_is_committed_or_rolled_back_before_it_is_answered(
    program: Any, transport: str, place: str
) -> None:
    app, path = program.app, "socket.io"
    if place == "mounted":
        app, path = program.api, "live/socket.io"
        app.mount("/live", socketio.ASGIApp(program.sio, socketio_path=f"/{path}"))
    async with serve(app, ws="websockets-sansio", log_level="critical") as port:
        client = socketio.AsyncClient(reconnection=False)
        url = f"http://127.0.0.1:{port}"
        await client.connect(url, transports=[transport], socketio_path=path)
        assert await client.call("write", "one") == "stored"
        assert await program.outside.rows(ENTRIES) == ["one"]
        assert await client.call("write", "") == "failed"
        answers = await asyncio.gather(*(client.call("write", str(n)) for n in range(10)))
        assert answers == 10 * ["stored"]
        assert connections_out(program.connect) == 0
        async with httpx.AsyncClient() as http:
            events = (await http.get(f"{url}/entries")).text.split()[1::2]
        assert sorted(events) == [*"0123456789", "one"]
        # By the server: a client that polls would wait for the answer to its last poll.
        await program.sio.disconnect(client.get_sid())
        await client.disconnect()
        await program.sio.shutdown()


async def test_an_event_without_a_block_has_no_context(connect: DBConnect) -> None:
    errors: asyncio.Queue[Exception] = asyncio.Queue()
    sio = socketio.AsyncServer(async_mode="asgi")

    async def write(_: str) -> None:
        try:
            await db_session(connect)
        except ContextNotInitiatedError as error:
            errors.put_nowait(error)

    sio.event(write)
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    around = socketio.ASGIApp(sio, other_asgi_app=app)
    async with serve(around, ws="websockets-sansio", log_level="critical") as port:
        client = socketio.AsyncClient(reconnection=False)
        await client.connect(f"http://127.0.0.1:{port}", transports=["websocket"])
        await client.emit("write")
        assert "new_db_session_ctx" in str(await errors.get())
        await client.disconnect()


class Stream:
    """An application that streams events, each of which writes an item first."""

    def __init__(self, connect: DBConnect) -> None:
        self.app = FastAPI()
        add_fastapi_http_db_session_middleware(self.app)
        self.may_end = asyncio.Event()

        async def write_items(last: str) -> AsyncGenerator[str]:
            session = await db_session(connect)
            for name in "one", last:
                await session.execute(insert(Item).values(name=name))
                yield name
            await self.may_end.wait()
            if last == "bad":
                raise RuntimeError

        @self.app.get("/events/{last}")
        async def get_events(last: str) -> EventSourceResponse:
            return EventSourceResponse(write_items(last))


async def test_what_a_stream_of_events_writes_is_committed_before_its_end(
    connect: DBConnect, database: Database
) -> None:
    stream = Stream(connect)
    async with http_client(stream.app) as client, client.stream("GET", "/events/two") as response:
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(3)] == ["data: one", "", "data: two"]
        assert await database.names() == []
        stream.may_end.set()
        assert [line async for line in lines] == [""]
        assert await database.names() == ["one", "two"]


async def test_a_stream_of_events_that_raises_is_cut_off_and_rolled_back(
    connect: DBConnect, database: Database
) -> None:
    stream = Stream(connect)
    stream.may_end.set()
    async with http_client(stream.app, log_level="critical") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/events/bad")
    assert await database.names() == []


async def test_a_stream_with_a_block_for_each_event_holds_no_connection_between_them(
    connect: DBConnect, database: Database
) -> None:
    sent, app = asyncio.Event(), FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def write_items() -> AsyncGenerator[str]:
        for name in "one", "two":
            async with new_db_session_ctx():
                session = await db_session(connect)
                await session.execute(insert(Item).values(name=name))
            yield name
            await sent.wait()

    @app.get("/events")
    async def get_events() -> EventSourceResponse:
        return EventSourceResponse(write_items())

    async with http_client(app) as client, client.stream("GET", "/events") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "data: one"
        assert await database.names() == ["one"]
        assert connections_out(connect) == 0
        sent.set()
        assert [line async for line in lines]
    assert await database.names() == ["one", "two"]


async def test_a_stream_of_events_is_rolled_back_when_its_client_leaves(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(connect)
    async with http_client(stream.app) as client:
        async with client.stream("GET", "/events/two") as response:
            assert await anext(response.aiter_lines()) == "data: one"
            assert connections_out(connect) == 1
        await until(lambda: connections_out(connect) == 0)
    assert await database.names() == []
    assert "was not completed" in caplog.text
