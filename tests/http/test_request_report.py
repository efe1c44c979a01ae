"""What a request did is reported at its end, and a slow statement of it at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.observability import (
    ASGIRequestReportMiddleware,
    RequestReport,
    count_queries,
)
from tests.helpers.asgi import add, app_of, call, http_scope
from tests.helpers.database import Database
from tests.helpers.serving import http_client
from tests.helpers.store import Store


class Reports(list[RequestReport]):
    def one(self) -> RequestReport:
        assert len(self) == 1
        return self.pop()

    def add(self, report: RequestReport) -> None:
        self.append(report)


@pytest.fixture
def reports() -> Reports:
    return Reports()


async def test_a_report_has_the_statements_and_their_times(store: Store, reports: Reports) -> None:
    async def handle(_: object) -> int:
        await add(store.connect, "a", "b")
        session = await db_session(store.connect)
        await session.execute(text("SELECT name FROM item"))
        await asyncio.sleep(0.02)
        return 200

    app = ASGIRequestReportMiddleware(app_of(handle), reports.add)
    await call(app, http_scope("/a"))
    report = reports.one()
    assert (report.method, report.path, report.route) == ("GET", "/a", "")
    assert report.statements == 2
    assert 0 < report.slowest_seconds < report.statement_seconds < report.holding_seconds
    assert report.waiting_seconds > 0
    assert report.holding_seconds > 0.02
    assert report.slowest is not None
    assert "item" in report.slowest


async def test_a_request_without_a_statement_has_an_empty_report(reports: Reports) -> None:
    async def handle(_: object) -> int:
        return 404

    await call(ASGIRequestReportMiddleware(app_of(handle), reports.add))
    assert reports.one() == RequestReport("GET", "/", "", 0, 0, 0, 0, None, 0)


async def test_a_statement_that_fails_or_is_cancelled_has_its_time(
    connect: DBConnect, reports: Reports
) -> None:
    async def handle(scope: Any) -> int:
        session = await db_session(connect)
        if scope["path"] == "/fails":
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT nonsense"))
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await session.execute(text("SELECT pg_sleep(60)"))
        return 500

    app = ASGIRequestReportMiddleware(app_of(handle), reports.add)
    await call(app, http_scope("/fails"))
    report = reports.one()
    assert report.statements == 1
    assert 0 < report.slowest_seconds == report.statement_seconds
    await call(app, http_scope("/cancelled"))
    report = reports.one()
    assert report.statements == 1
    assert 0.04 < report.slowest_seconds < 5
    assert report.slowest == "SELECT pg_sleep(60)"


async def test_waiting_for_a_connection_is_counted(
    database_url: URL, database: Database, reports: Reports
) -> None:
    async with DBConnect.from_url(database_url, pool_size=1, max_overflow=0) as connect:

        async def handle(_: object) -> int:
            await (await db_session(connect)).execute(text("SELECT 1"))
            return 200

        app = ASGIRequestReportMiddleware(app_of(handle), reports.add)
        async with new_db_session_ctx():
            await (await db_session(connect)).execute(text("SELECT 1"))
            request = asyncio.create_task(call(app))
            async with asyncio.timeout(10):
                while not connect.pool_status().waiting:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
        await request
    report = reports.one()
    assert report.waiting_seconds >= 0.04


async def test_concurrent_requests_have_their_own_statements(
    store: Store, reports: Reports
) -> None:
    at_once = asyncio.Barrier(3)

    async def handle(scope: Any) -> int:
        session = await db_session(store.connect)
        for _ in range(int(scope["path"][1:])):
            await session.execute(text("SELECT 1"))
            await session.commit()
        await at_once.wait()
        return 200

    app = ASGIRequestReportMiddleware(app_of(handle), reports.add)
    with count_queries() as queries:
        await asyncio.gather(*(call(app, http_scope(f"/{n}")) for n in (1, 2, 4)))
    assert sorted(report.statements for report in reports) == [1, 2, 4]
    assert len(queries) == 7


@pytest.fixture
def fastapi(connect: DBConnect) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def select(number: int) -> None:
        for _ in range(number):
            await (await db_session(connect)).execute(text("SELECT 1"))

    @app.get("/stream/{number}")
    async def stream(number: int, tasks: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            await select(number)
            yield "done"

        tasks.add_task(select, number)
        return StreamingResponse(body(), background=tasks)

    @app.get("/fail/{number}")
    async def fail(number: int) -> None:
        await select(number)
        raise HTTPException(409)

    @app.get("/crash/{number}")
    async def crash(number: int) -> None:
        await select(number)
        raise ValueError

    return app


async def until_reported(reports: Reports) -> RequestReport:
    async with asyncio.timeout(10):
        while not reports:
            await asyncio.sleep(0.001)
    return reports.one()


async def test_bodies_background_tasks_and_failures_are_in_the_report(
    fastapi: FastAPI, reports: Reports
) -> None:
    fastapi.add_middleware(ASGIRequestReportMiddleware, report=reports.add)
    async with http_client(fastapi, log_level="critical") as client:
        for path, expected in {"stream": 4, "fail": 2, "crash": 2}.items():
            await client.get(f"/{path}/2")
            report = await until_reported(reports)
            assert report.statements == expected
            assert report.route == f"/{path}/{{number}}"
            assert report.path == f"/{path}/2"


async def test_a_pipelined_request_is_no_part_of_the_one_before(
    fastapi: FastAPI, reports: Reports
) -> None:
    fastapi.add_middleware(ASGIRequestReportMiddleware, report=reports.add)
    async with http_client(fastapi) as client:
        port = client.base_url.port
        assert port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        # uvicorn starts the second from inside the first, whose background task still runs.
        for number in (1, 3):
            writer.write(f"GET /stream/{number} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        async with asyncio.timeout(10):
            while len(reports) < 2:
                await asyncio.sleep(0.001)
        await reader.read(1)
        writer.close()
        await writer.wait_closed()
    assert sorted(report.statements for report in reports) == [2, 6]


async def test_the_report_of_a_mounted_application_is_a_part_of_the_outer_one(
    fastapi: FastAPI,
) -> None:
    outer, inner = Reports(), Reports()
    fastapi.add_middleware(ASGIRequestReportMiddleware, report=inner.add)
    app = FastAPI()
    app.mount("/inner", fastapi)
    app.add_middleware(ASGIRequestReportMiddleware, report=outer.add)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/inner/fail/2")
    assert (outer.one().statements, inner.one().statements) == (2, 2)


async def test_a_slow_statement_names_its_request_and_no_parameter(
    connect: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(_: object) -> int:
        session = await db_session(connect)
        await session.execute(text("SELECT 1"))
        await session.execute(text("SELECT pg_sleep(:s),\n  :word"), {"s": 0.06, "word": "secret"})
        return 200

    app = ASGIRequestReportMiddleware(app_of(handle), slow_query_threshold=0.05)
    scope = {**http_scope("/a\nb"), "query_string": b"secret"}
    with caplog.at_level(logging.WARNING, "context_async_sqlalchemy"):
        await call(app, scope)
    messages = [record.getMessage() for record in caplog.records]
    [message] = [message for message in messages if "pg_sleep" in message]
    assert message.startswith("A statement of the request GET '/a\\nb' took 0.")
    assert "SELECT pg_sleep($1" in message
    assert "secret" not in message


async def test_a_report_that_raises_is_logged_and_the_answer_is_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handle(_: object) -> int:
        return 200

    def raise_(_: RequestReport) -> None:
        raise ValueError

    sent = await call(ASGIRequestReportMiddleware(app_of(handle), raise_))
    assert sent[0]["status"] == 200
    assert "The report of a request failed (GET '/')" in caplog.text


async def test_what_outlives_the_request_is_no_part_of_it(store: Store, reports: Reports) -> None:
    tasks: list[asyncio.Task[None]] = []
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def later() -> None:
        async with new_db_session_ctx():
            await (await db_session(store.connect)).execute(text("SELECT 1"))
            has_begun.set()
            await may_go_on.wait()
            await (await db_session(store.connect)).execute(text("SELECT 2"))

    async def handle(_: object) -> int:
        tasks.append(asyncio.create_task(later()))
        await has_begun.wait()
        return 200

    await call(ASGIRequestReportMiddleware(app_of(handle), reports.add))
    report = reports.one()
    may_go_on.set()
    await tasks[0]
    assert report.statements == 1
    assert report.holding_seconds > 0  # until the end of the request


async def a_report(_: RequestReport) -> None:
    """Is async, which nobody would await."""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"report": a_report}, TypeError),
        ({"report": "print"}, TypeError),
        ({"slow_query_threshold": 0}, ValueError),
        ({"sql_comments": {"user"}}, ValueError),
        ({"sql_comments": "route"}, ValueError),
    ],
)
def test_options_that_are_of_no_use_are_refused(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        ASGIRequestReportMiddleware(app_of(_nothing), **options)


async def _nothing(_: object) -> int:
    return 200
