"""A context is used by the request that it was opened for, and not by others that inherit it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.asgi_types import Message, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.serving import serve

dependency = DBSessionDependency()
OfRequest = Annotated[AsyncSession, Depends(dependency)]
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Watched:
    """An application whose `/first` has a context, and works on after its response.

    Attributes:
        has_received: Whether /first has received all but the last byte of 100,000.
        found: What each other request, or WebSocket, was told when it asked for a session.
    """

    def __init__(
        self,
        connect: DBConnect,
        others_pass_the_middleware: bool = False,
        in_block: bool = False,
        **options: Any,
    ) -> None:
        self._in_block = in_block
        self.connect = connect
        self.found: asyncio.Queue[object] = asyncio.Queue()
        self.has_received = asyncio.Event()
        self._has_found = asyncio.Event()
        self._inside = ASGIHTTPDBSessionMiddleware(self.first, **options)
        self._other: Callable[..., Awaitable[None]] = self.other
        if others_pass_the_middleware:
            self._other = ASGIHTTPDBSessionMiddleware(self.other, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        await (self._inside if scope["path"] == "/first" else self._other)(scope, receive, send)

    async def first(self, _: Scope, receive: Receive, send: Send) -> None:
        session = await db_session(self.connect)
        await session.execute(insert(Item).values(name="first"))
        received = 0
        while (message := await receive()).get("more_body"):
            received += len(message["body"])
            if received == 99_999:
                self.has_received.set()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
        )
        async with new_db_session_ctx() if self._in_block else nullcontext():
            await send({"type": "http.response.body", "body": b"a"})
            async with asyncio.timeout(5):
                await self._has_found.wait()
        assert await db_session(self.connect) is session

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.found.put_nowait(await db_session(self.connect))
        except ContextNotInitiatedError as error:
            self.found.put_nowait(type(error))
        self._has_found.set()
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        await send(
            {"type": "http.response.start", "status": 418, "headers": [(b"content-length", b"0")]}
        )
        await send({"type": "http.response.body"})


@asynccontextmanager
async def talking(port: int, *parts: str) -> AsyncGenerator[None]:
    """Send requests on one connection, without waiting for the answers."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        writer.write("".join(parts).encode())
        yield
    writer.close()
    await writer.wait_closed()


def request(path: str, headers: str = "", body: str = "") -> str:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n{length}{headers}\r\n{body}"


@pytest.mark.parametrize("options", [{}, {"attempts": 2}, {"in_block": True}], ids=str)
@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_a_pipelined_request_without_the_middleware_has_no_context(
    connect: DBConnect, database: Database, http: str, options: dict[str, Any]
) -> None:
    watched = Watched(connect, **options)
    async with serve(watched, http=http) as port:
        async with talking(port, request("/first"), request("/other")):
            found = await watched.found.get()
        assert found is ContextNotInitiatedError
    assert await database.names() == ["first"]


@pytest.mark.parametrize("passes", [True, False])
async def test_a_pipelined_websocket_has_no_context(
    connect: DBConnect, database: Database, passes: bool
) -> None:
    watched = Watched(connect, others_pass_the_middleware=passes)
    async with serve(watched, http="h11", ws="wsproto") as port:
        async with talking(port, request("/first"), request("/other", UPGRADE)):
            found = await watched.found.get()
        assert found is ContextNotInitiatedError
    assert await database.names() == ["first"]


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_a_request_after_a_large_body_has_no_context(
    connect: DBConnect, database: Database, http: str
) -> None:
    watched = Watched(connect)
    # uvicorn stops reading at 64 KiB, and goes on inside the receive of the application.
    large = request("/first", body="a" * 100_000)
    async with serve(watched, http=http, loop="asyncio") as port, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(large[:-1].encode())
        await watched.has_received.wait()
        writer.write(large[-1:].encode())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(request("/other").encode())
        found = await watched.found.get()
        writer.close()
        await writer.wait_closed()
    assert found is ContextNotInitiatedError
    assert await database.names() == ["first"]


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_a_request_that_asks_by_itself_does_not_join_the_one_before_it(
    connect: DBConnect, database: Database, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependency, "_connect", connect)
    app = FastAPI()
    has_come, sessions = asyncio.Event(), []

    @app.get("/first")
    async def first(tasks: BackgroundTasks, session: OfRequest) -> str:
        async def work_on() -> None:
            async with asyncio.timeout(5):
                await has_come.wait()
            await session.execute(insert(Item).values(name="first"))

        tasks.add_task(work_on)
        return "a"

    @app.get("/other", status_code=418)
    async def other() -> Response:
        has_come.set()
        sessions.append(await db_session(connect))
        await sessions[0].execute(insert(Item).values(name="refused"))
        return Response(status_code=418)

    async with (
        serve(app, http=http) as port,
        talking(port, request("/first"), request("/other")),
    ):
        await has_come.wait()
    assert sessions == []
    assert await database.names() == ["first"]


def with_middleware(app: FastAPI) -> Any:
    add_fastapi_http_db_session_middleware(app)
    return app


def with_dispatch(app: FastAPI) -> Any:
    app.add_middleware(BaseHTTPMiddleware, dispatch=fastapi_http_db_session_middleware)
    return app


def with_attempts(app: FastAPI) -> Any:
    add_fastapi_http_db_session_middleware(app, attempts=2)
    return app


def mounted(app: FastAPI) -> Any:
    """Return an application whose mounted one has a middleware, and gets a copied scope."""
    inside = with_middleware(app)
    outside = FastAPI()

    async def mount(scope: Scope, receive: Receive, send: Send) -> None:
        await inside({**scope, "root_path": ""}, receive, send)

    outside.mount("/", mount)
    return with_middleware(outside)


def with_nothing(app: FastAPI) -> Any:
    return app


class Batch:
    """An application that calls itself for each part of a batch, with a copy of the scope.

    Attributes:
        statuses: Those of the parts.
        sessions: The session of the batch, then that of each part.
    """

    def __init__(self, add: Callable[[FastAPI], Any]) -> None:
        self.statuses: list[int] = []
        self.sessions: list[AsyncSession] = []
        self._inside = FastAPI()
        self._inside.get("/batch/{status}")(self.batch)
        self._inside.get("/part/{status}")(self.part)
        self.app = add(self._inside)

    async def insert(self, name: str) -> None:
        session = await db_session(dependency.connect)
        self.sessions.append(session)
        await session.execute(insert(Item).values(name=name))

    async def batch(self, status: int, request: Request, _: OfRequest) -> Response:
        await self.insert("batch")
        for part in (201, 404, 202):
            await self._inside(self._copy(request.scope, part), request.receive, self._keep)
        assert await db_session(dependency.connect) is self.sessions[0]
        return Response(status_code=status)

    async def part(self, status: int, _: OfRequest) -> Response:
        await self.insert(f"part {status}")
        return Response(status_code=status)

    async def _keep(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])

    def _copy(self, scope: Scope, part: int) -> Scope:
        path = f"/part/{part}"
        return {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}


ADD = [with_middleware, with_dispatch, with_attempts, mounted, with_nothing]


@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("add", ADD)
async def test_each_part_of_a_batch_is_a_request_of_its_own(
    connect: DBConnect,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    add: Callable[[FastAPI], Any],
    status: int,
) -> None:
    monkeypatch.setattr(dependency, "_connect", connect)
    batch = Batch(add)
    transport = httpx.ASGITransport(app=batch.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get(f"/batch/{status}")).status_code == status
    assert batch.statuses == [201, 404, 202]
    assert len(set(batch.sessions)) == 4
    expected = ["part 201", "part 202"] + (["batch"] if status == 200 else [])
    assert sorted(await database.names()) == sorted(expected)


async def test_a_part_of_a_batch_that_asks_by_itself_has_no_context_without_the_middleware(
    connect: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependency, "_connect", connect)
    app = FastAPI()
    found: list[object] = []

    @app.get("/batch")
    async def batch(request: Request, session: OfRequest) -> Response:
        async def keep(_: Message) -> None:
            pass

        await session.execute(insert(Item).values(name="batch"))
        with pytest.raises(ContextNotInitiatedError):
            await app({**request.scope, "path": "/part"}, request.receive, keep)
        return Response()

    @app.get("/part")
    async def part() -> Response:
        found.append(await db_session(connect))
        return Response(status_code=404)

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/batch")).status_code == 200
    assert found == []
    assert await database.names() == ["batch"]


async def test_a_mount_that_copies_the_scope_is_of_the_same_request(
    connect: DBConnect, database: Database
) -> None:
    sessions: list[AsyncSession] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        sessions.append(await db_session(connect))
        await sessions[0].execute(insert(Item).values(name="refused"))
        await Response(status_code=404)(scope, receive, send)

    inside = ASGIHTTPDBSessionMiddleware(handler)

    async def mount(scope: Scope, receive: Receive, send: Send) -> None:
        sessions.append(await db_session(connect))
        await inside({**scope, "path": "/"}, receive, send)

    app = ASGIHTTPDBSessionMiddleware(mount)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/mounted")).status_code == 404
    assert len(set(sessions)) == 1
    assert await database.names() == []
