"""The programs of the how-to pages on what happens beyond a request's handler, run."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import BackgroundTasks, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from context_async_sqlalchemy import (
    ContextClosedError,
    db_session,
    is_context_initiated,
    new_db_session_ctx,
    on_commit,
    rollback_all_sessions,
)
from tests.helpers.connections import connections_out
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client, serve

# Background work


@pytest_asyncio.fixture
async def documents(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the documents, served, with a client in it."""
    documents = load("background_work", url)
    documents.outside = Outside(url)
    async with http_client(documents.app) as documents.client:
        yield documents
        await until(lambda: connections_out(documents.connect) == 0)


WORDS = "SELECT name, words FROM counted_document ORDER BY name"


async def words_are(documents: Any, expected: list[tuple[str, int | None]]) -> None:
    async def are_there() -> bool:
        return list(await documents.outside.rows(WORDS)) == expected

    await until(are_there)


async def test_a_background_task_uses_the_session_of_its_request_and_is_committed(
    documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, sessions = asyncio.Event(), []
    original, session_of = documents.count_words, documents.db_session

    async def count_words(name: str) -> None:
        await may_go_on.wait()
        await original(name)

    async def remembered(connect: Any) -> Any:
        session = await session_of(connect)
        sessions.append(session)
        return session

    monkeypatch.setattr(documents, "count_words", count_words)
    monkeypatch.setattr(documents, "db_session", remembered)
    response = await documents.client.post("/documents/a?body=one two")
    assert response.status_code == 202
    assert await documents.outside.rows(WORDS) == [("a", None)]
    assert connections_out(documents.connect) == 0
    may_go_on.set()
    await words_are(documents, [("a", 2)])
    assert len(sessions) >= 2
    assert sessions[-1] is sessions[-2]


async def test_no_background_task_runs_when_the_commit_fails(
    documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    async def count_words(name: str) -> None:
        counted.append(name)

    monkeypatch.setattr(documents, "count_words", count_words)
    assert (await documents.client.post("/documents/a?body=one")).status_code == 202
    assert (await documents.client.post("/documents/a?body=two")).status_code == 500
    await until(lambda: counted)
    assert counted == ["a"]


async def test_a_background_task_that_fails_undoes_no_other_in_a_context_of_its_own(
    documents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await documents.client.post("/documents/a?body=one two")
    await words_are(documents, [("a", 2)])  # SQLite has one writer at a time
    await documents.client.post("/documents/b?body=one two")
    await words_are(documents, [("a", 2), ("b", 2)])
    async with documents.outside.connection() as connection:
        await connection.execute(text("UPDATE counted_document SET words = 0"))
    assert (await documents.client.post("/recounts?names=a,nothing,b")).status_code == 202
    await until(lambda: "NoResultFound" in caplog.text)
    await words_are(documents, [("a", 2), ("b", 0)])  # Starlette stops at the first that fails


async def test_background_tasks_of_one_response_are_one_transaction(
    documents: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call(function: Callable[[str], Any], name: str) -> None:
        await function(name)

    monkeypatch.setattr(documents, "run_in_new_ctx", call)
    await documents.client.post("/documents/a?body=one two")
    await words_are(documents, [("a", 2)])
    async with documents.outside.connection() as connection:
        await connection.execute(text("UPDATE counted_document SET words = 0"))
    assert (await documents.client.post("/recounts?names=a,nothing")).status_code == 202
    too_many = ",".join("a" * 101)
    assert (await documents.client.post(f"/recounts?names={too_many}")).status_code == 422
    await until(lambda: "NoResultFound" in caplog.text)
    await until(lambda: connections_out(documents.connect) == 0)
    assert await documents.outside.rows(WORDS) == [("a", 0)]


async def test_a_task_that_is_started_after_the_commit_sees_the_row(documents: Any) -> None:
    await documents.client.post("/documents/a?body=one two")
    await words_are(documents, [("a", 2)])
    assert (await documents.client.put("/documents/a?body=one two three")).status_code == 200
    await words_are(documents, [("a", 3)])
    await until(lambda: not documents.running)


async def test_a_task_that_outlives_its_request_without_a_context_is_refused(
    documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, may_go_on = [], asyncio.Event()

    async def count_later(name: str) -> None:
        await may_go_on.wait()
        await documents.count_words(name)

    monkeypatch.setattr(
        documents,
        "start_counting",
        lambda name: tasks.append(asyncio.create_task(count_later(name))),
    )
    await documents.client.post("/documents/a?body=one two")
    await words_are(documents, [("a", 2)])
    assert (await documents.client.put("/documents/a?body=one")).status_code == 200
    may_go_on.set()
    with pytest.raises(ContextClosedError):
        await tasks[0]


async def test_background_work_is_committed_though_the_request_was_refused(
    documents: Any,
) -> None:
    response = await documents.client.delete("/documents/a?visitor=ann")
    assert response.status_code == 403
    names = "SELECT name FROM refused_visitor"
    assert await until(lambda: documents.outside.rows(names)) == ["ann"]


async def test_no_background_task_runs_after_an_http_exception(documents: Any) -> None:
    async def refuse(background: BackgroundTasks) -> None:
        background.add_task(documents.remember, "ann")
        raise HTTPException(403)

    documents.app.add_api_route("/refused", refuse)
    assert (await documents.client.get("/refused")).status_code == 403
    await documents.client.delete("/documents/a?visitor=bob")
    names = "SELECT name FROM refused_visitor"
    assert await until(lambda: documents.outside.rows(names)) == ["bob"]


# Streaming


@pytest_asyncio.fixture
async def readings(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the readings, served, with a client in it."""
    async with served_readings(url, load) as readings:
        yield readings


@asynccontextmanager
async def served_readings(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    readings = load("streaming", url)
    readings.outside = Outside(url)
    async with serve(readings.app) as readings.port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{readings.port}") as client:
            readings.client = client
            await client.get("/openapi.json")  # once it answers, there are tables
            yield readings
        await until(lambda: connections_out(readings.connect) == 0)


async def add_readings(readings: Any, count: int, value: str = "1") -> None:
    async with readings.outside.connection() as connection:
        rows = [{"sensor": "a", "value": value} for _ in range(count)]
        await connection.execute(insert(readings.Reading), rows)


COUNT = "SELECT count(*) FROM sensor_reading"


async def test_an_export_holds_no_connection_while_its_client_reads(
    readings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_readings(readings, 250)
    sizes = []
    original = readings.as_csv

    def as_csv(page: Any) -> str:
        assert connections_out(readings.connect) == 0
        sizes.append(len(page))
        return str(original(page))

    monkeypatch.setattr(readings, "as_csv", as_csv)
    response = await readings.client.get("/readings.csv")
    assert sizes == [100, 100, 50]
    assert response.text == "".join(f"{number},1\n" for number in range(1, 251))


async def test_what_was_taken_out_is_gone_when_the_client_has_it_all(readings: Any) -> None:
    await add_readings(readings, 250)
    response = await readings.client.delete("/readings.csv")
    assert response.text.count("\n") == 250
    assert await readings.outside.rows(COUNT) == [0]


async def hang_up(readings: Any, request: str) -> None:
    """Read the head of a response and the first byte of its body, and go."""
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", readings.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    writer.write(f"{request} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    async with asyncio.timeout(10):
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(1)
    assert connections_out(readings.connect) == 1
    writer.transport.abort()


async def test_what_a_client_that_hangs_up_was_taking_out_is_kept(
    postgresql: str, load: Callable[[str, str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with served_readings(postgresql, load) as readings:
        await add_readings(readings, 120, "1" * 100_000)
        await hang_up(readings, "DELETE /readings.csv")
        await until(lambda: connections_out(readings.connect) == 0)
        assert await readings.outside.rows(COUNT) == [120]
        await until(lambda: "A response was not completed" in caplog.text)


async def test_an_export_that_finds_nothing_is_a_404(readings: Any) -> None:
    await add_readings(readings, 3)
    assert (await readings.client.get("/sensors/b.csv")).status_code == 404
    response = await readings.client.get("/sensors/a.csv")
    assert response.text == "1,1\n2,1\n3,1\n"


async def test_a_cursor_holds_its_connection_until_its_client_leaves(
    postgresql: str, load: Callable[[str, str], Any]
) -> None:
    async with served_readings(postgresql, load) as readings:
        await add_readings(readings, 120, "1" * 100_000)
        await hang_up(readings, "GET /sensors/a.csv")
        await until(lambda: connections_out(readings.connect) == 0)


async def test_a_commit_closes_the_cursor_of_the_handler(
    postgresql: str, load: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served_readings(postgresql, load) as readings:
        await add_readings(readings, 2000)
        monkeypatch.setattr(readings, "commit_after_response", lambda: None)
        with pytest.raises(httpx.RemoteProtocolError):
            await readings.client.get("/sensors/a.csv")


async def test_a_body_may_open_a_cursor_of_its_own(readings: Any) -> None:
    async def body() -> AsyncGenerator[str]:
        session = await db_session(readings.connect)
        async for reading in await session.stream_scalars(select(readings.Reading)):
            yield readings.as_csv([reading])

    readings.app.add_api_route("/cursor", lambda: StreamingResponse(body()))
    await add_readings(readings, 2000)
    assert (await readings.client.get("/cursor")).text.count("\n") == 2000


async def test_events_are_sent_as_they_are_committed_and_hold_no_connection(
    readings: Any,
) -> None:
    async with readings.client.stream("GET", "/events") as response:
        lines = response.aiter_lines()
        for number in 1, 2:
            await add_readings(readings, 1, str(number * 10))
            async with asyncio.timeout(10):
                received = [await anext(lines) for _ in range(3)]
            assert received == [f"id: {number}", f"data: {number * 10}", ""]
            await until(lambda: connections_out(readings.connect) == 0)
    async with (
        asyncio.timeout(10),
        readings.client.stream("GET", "/events?last=1") as response,
    ):
        assert await anext(response.aiter_lines()) == "id: 2"


# Your own middleware


@pytest_asyncio.fixture
async def stock(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the stock, served, with a client in it."""
    stock = load("own_middleware", url)
    stock.outside = Outside(url)
    async with http_client(stock.app) as stock.client:
        assert (await stock.client.post("/articles/tea/5")).json() == 5
        yield stock
        assert connections_out(stock.connect) == 0


STOCK = "SELECT name, stock FROM stocked_article ORDER BY name"


async def test_before_commit_refuses_what_may_not_be_stored(stock: Any) -> None:
    response = await stock.client.post("/articles/tea/-6")
    assert (response.status_code, response.json()) == (409, {"detail": "not in stock"})
    assert await stock.outside.rows(STOCK) == [("tea", 5)]


async def test_commit_on_keeps_what_an_error_of_ones_choice_wrote(stock: Any) -> None:
    assert (await stock.client.post("/unpaid/tea/-1")).status_code == 402
    assert await stock.outside.rows(STOCK) == [("tea", 4)]


async def test_a_dry_run_answers_as_the_request_would_and_leaves_nothing(stock: Any) -> None:
    dry = {"X-Dry-Run": "1"}
    for path, answer in ("/articles/tea/2", 7), ("/articles/milk/1", 1):
        response = await stock.client.post(path, headers=dry)
        assert (response.status_code, response.json()) == (200, answer)
    assert (await stock.client.get("/openapi.json", headers=dry)).status_code == 200
    assert await stock.outside.rows(STOCK) == [("tea", 5)]


async def test_a_dry_run_tells_what_the_database_refuses(
    stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def change(name: str, by: int) -> int:
        session = await db_session(stock.connect)
        session.add(stock.Article(name=name, stock=by))
        return by

    monkeypatch.setattr(stock, "change", change)
    response = await stock.client.post("/articles/tea/2", headers={"X-Dry-Run": "1"})
    assert response.status_code == 500
    assert await stock.outside.rows(STOCK) == [("tea", 5)]


async def test_a_dry_run_drops_what_waits_for_the_commit(stock: Any) -> None:
    called = []

    async def endpoint() -> None:
        await stock.change("tea", 1)
        on_commit(stock.connect, lambda: called.append("tea"))

    stock.app.add_api_route("/called", endpoint)
    for headers in {"X-Dry-Run": "1"}, {}:
        assert (await stock.client.get("/called", headers=headers)).status_code == 200
        assert called == ([] if headers else ["tea"])


async def test_a_dispatch_function_inside_may_undo_a_request(
    url: str, load: Callable[[str, str], Any]
) -> None:
    stock = load("own_middleware", url)

    async def undo(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        if "dry" in request.query_params:
            await rollback_all_sessions()
        return response

    middleware = Middleware(BaseHTTPMiddleware, dispatch=undo)
    stock.app.user_middleware.append(middleware)
    async with http_client(stock.app) as client:
        assert (await client.post("/articles/tea/5?dry")).json() == 5
        assert (await client.post("/articles/tea/3")).json() == 3
    assert await Outside(url).rows(STOCK) == [("tea", 3)]


async def test_the_reply_of_a_handler_decides(stock: Any) -> None:
    assert await stock.take("tea", 3) == ("OK", 2)
    assert await stock.outside.rows(STOCK) == [("tea", 2)]
    assert await stock.take("tea", 3) == ("FAILED_PRECONDITION", -1)
    assert await stock.outside.rows(STOCK) == [("tea", 2)]
    assert not is_context_initiated()


async def test_a_handler_that_raises_is_rolled_back_and_its_session_closed(
    stock: Any,
) -> None:
    async def stumble(name: str, number: int) -> Any:
        await stock.change(name, number)
        raise ValueError(name)

    with pytest.raises(ValueError, match="tea"):
        await stock.unit_of_work(stumble)("tea", 3)
    assert connections_out(stock.connect) == 0
    assert not is_context_initiated()
    assert await stock.outside.rows(STOCK) == [("tea", 5)]


async def test_a_commit_that_fails_is_raised_by_the_handler(stock: Any) -> None:
    async def add(name: str, number: int) -> Any:
        (await db_session(stock.connect)).add(stock.Article(name=name, stock=number))
        return stock.Reply("OK", number)

    with pytest.raises(IntegrityError):
        await stock.unit_of_work(add)("tea", 3)
    assert connections_out(stock.connect) == 0


async def test_a_handler_in_another_context_is_a_unit_of_work_of_its_own(stock: Any) -> None:
    async with new_db_session_ctx():
        outer = await db_session(stock.connect)
        assert await stock.take("tea", 3) == ("OK", 2)
        assert await db_session(stock.connect) is outer
    assert await stock.outside.rows(STOCK) == [("tea", 2)]
