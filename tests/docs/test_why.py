"""The programs of the page *Why*: what the client sees and what the database holds, both ways."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from context_async_sqlalchemy._engine.pool import pool_status
from tests.helpers.connections import connections_out
from tests.helpers.programs import Outside, load_program, until
from tests.helpers.serving import http_client, serve

BOTH = pytest.mark.parametrize("name", ["before", "after"])
# FastAPI ends a dependency that yields after the response since 0.118; in 0.115 it did so before.
ENDS_AFTER_RESPONSE = tuple(map(int, version("fastapi").split(".")[:2])) >= (0, 118)


IDLE_IN_TRANSACTION = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND state = 'idle in transaction'"
)


class Program:
    """A program of the page, and its database seen from outside."""

    def __init__(self, module: Any, url: str) -> None:
        self.module = module
        self._outside = Outside(url)

    async def bookings(self) -> Sequence[Any]:
        return await self._outside.rows("SELECT seat FROM booking ORDER BY seat")

    async def guests(self) -> Sequence[Any]:
        return await self._outside.rows("SELECT name FROM guest ORDER BY name")

    async def book(self, seat: str) -> None:
        async with self._outside.connection() as connection:
            await connection.execute(text("INSERT INTO booking VALUES (:seat)"), {"seat": seat})

    async def connections_out(self) -> int:
        engine: AsyncEngine = self.module.session_maker.kw["bind"]
        out = pool_status(engine).checked_out + connections_out(self.module.connect)
        if self._outside.url.startswith("postgresql"):
            assert await self._outside.rows(IDLE_IN_TRANSACTION) == [out]
        return out

    def client_of(self, name: str) -> Any:
        return http_client(getattr(self.module, name))


@pytest.fixture
def program(
    load: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch, url: str
) -> Callable[[str], Program]:
    """Return a way to load a program of the page."""
    load("why.database", url)
    return lambda name: Program(load_program(monkeypatch, name), url)


@BOTH
async def test_a_commit_that_fails_is_a_success_for_the_client(
    program: Callable[[str], Program], name: str
) -> None:
    why = program("why.commit_after_response")
    async with why.client_of(name) as client:
        statuses = [(await client.post(f"/bookings/{seat}")).status_code for seat in ("A1", "A1")]
    assert statuses == [201, 201 if name == "before" and ENDS_AFTER_RESPONSE else 500]
    assert await why.bookings() == ["A1"]


async def test_a_dependency_with_the_scope_of_the_function_commits_before_the_response(
    program: Callable[[str], Program],
) -> None:
    why = program("why.commit_after_response")
    scope: Any = {"scope": "function"} if ENDS_AFTER_RESPONSE else {}
    dependency = Depends(why.module.get_session, **scope)
    app = FastAPI(lifespan=why.module.lifespan)

    @app.post("/bookings/{seat}", status_code=201)
    async def book(seat: str, session: Any = dependency) -> None:
        await why.module.book(seat, session)

    async with http_client(app) as client:
        statuses = [(await client.post(f"/bookings/{seat}")).status_code for seat in ("A1", "A1")]
    assert statuses == [201, 500]


async def test_a_dependency_commits_what_a_returned_response_refuses(
    program: Callable[[str], Program],
) -> None:
    why = program("why.commit_after_response")
    dependency = Depends(why.module.get_session)
    app = FastAPI(lifespan=why.module.lifespan)

    @app.post("/bookings/{seat}")
    async def book(seat: str, session: Any = dependency) -> JSONResponse:
        await why.module.book(seat, session)
        return JSONResponse({"detail": "the card is refused"}, status_code=402)

    async with http_client(app) as client:
        assert (await client.post("/bookings/A1")).status_code == 402
    assert await why.bookings() == ["A1"]


@BOTH
async def test_what_is_refused_is_stored(program: Callable[[str], Program], name: str) -> None:
    why = program("why.refused_and_stored")
    async with why.client_of(name) as client:
        assert (await client.post("/bookings/A1")).status_code == 402
    assert await why.bookings() == (["A1"] if name == "before" else [])


async def test_a_commit_is_a_rollback_after_a_failed_statement(
    program: Callable[[str], Program], url: str
) -> None:
    why = program("why.swallowed_error")
    is_postgresql = url.startswith("postgresql")
    async with why.client_of("before") as client:
        statuses = [(await client.post(f"/bookings/{n}/ann")).status_code for n in ("A1", "A2")]
        assert statuses == [201, 201]
        assert await why.bookings() == (["A1"] if is_postgresql else ["A1", "A2"])

    async with why.client_of("after") as client:
        response = await client.post("/bookings/A3/ann")
        assert response.status_code == (500 if is_postgresql else 201)
        assert ("A3" in await why.bookings()) is (not is_postgresql)
        response = await client.post("/bookings/A4/ann/with-savepoint")
        assert response.status_code == 201
        assert "A4" in await why.bookings()
    assert await why.guests() == ["ann"]


@BOTH
async def test_a_background_task_that_fails_takes_the_booking_along(
    program: Callable[[str], Program], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    why = program("why.background_task")
    with caplog.at_level(logging.ERROR, logger="uvicorn.error"):
        async with why.client_of(name) as client:  # which waits, in the end, for the task
            assert (await client.post("/bookings/A1/ann")).status_code == 201
    is_lost = name == "before" and ENDS_AFTER_RESPONSE
    assert await why.bookings() == ([] if is_lost else ["A1"])
    assert await why.guests() == []
    assert "no mail server for ann" in caplog.text


@asynccontextmanager
async def client_that_does_not_read(port: int, path: str) -> AsyncGenerator[None]:
    """Send a request, and read no more than the first line of the response."""
    # A small buffer on this side: the server has to wait for this client.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    try:
        yield
        await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


@BOTH
async def test_a_slow_client_holds_a_connection(
    program: Callable[[str], Program], name: str
) -> None:
    why = program("why.slow_client")
    is_held = name == "before" and ENDS_AFTER_RESPONSE
    path = "/bookings/A1/recording"
    async with (
        serve(getattr(why.module, name)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):

        async def is_served() -> bool:
            return (await client.get(path)).status_code == 200

        assert (await client.get(path)).status_code == 403
        await why.book("A1")
        async with client_that_does_not_read(port, path):
            assert await why.connections_out() == is_held
            assert (await client.get(path)).status_code == (500 if is_held else 200)
        await until(is_served)  # the server hears a moment later that all is read


@BOTH
async def test_what_a_child_task_writes_is_lost_with_its_connection(
    program: Callable[[str], Program], name: str
) -> None:
    why = program("why.session_of_the_task")
    is_lost = name == "before"
    async with why.client_of(name) as client:
        statuses = [(await client.post(f"/bookings/{seat}")).status_code for seat in ("A1", "A2")]
        try:
            assert statuses == ([201, 500] if is_lost else [201, 201])
            assert await why.bookings() == ([] if is_lost else ["A1", "A2"])
            assert await why.connections_out() == is_lost
        finally:
            for session in why.module.scoped_session.registry.registry.values():
                await session.close()
