"""A comment in each statement says of which route it is, in sqlcommenter's format."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import URL, text

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy._http.sql_comments import with_comment
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.observability import ASGIRequestReportMiddleware
from tests.helpers.asgi import add
from tests.helpers.database import Database
from tests.helpers.flight import Trip, opened
from tests.helpers.serving import http_client
from tests.helpers.store import Store

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


class RouteOf:
    def __init__(self, path: str) -> None:
        self.path = path


def scope_of(path: str, traceparent: str = "") -> dict[str, Any]:
    return {"route": RouteOf(path), "headers": [(b"traceparent", traceparent.encode())]}


def test_the_comment_has_sorted_keys_and_encoded_values() -> None:
    assert (
        with_comment(
            "SELECT 1", ["traceparent", "route"], scope_of("/users/{id}", f"{TRACE}-01"), False
        )
        == f"SELECT 1 /*route='%2Fusers%2F%7Bid%7D',traceparent='{TRACE}-01'*/"
    )


def test_a_value_cannot_end_the_comment() -> None:
    statement = with_comment("SELECT 1", ["route"], scope_of("/*/'; DROP TABLE item --"), False)
    assert statement.count("*/") == 1
    assert statement.count("'") == 2


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT 1;\n", "SELECT 1 /*route='a'*/;"),
        ("SELECT 1 /* mine */", "SELECT 1 /* mine */"),
        ("SELECT 1 -- mine", "SELECT 1 -- mine"),
    ],
)
def test_a_comment_comes_before_a_semicolon_and_not_after_a_comment(
    statement: str, expected: str
) -> None:
    assert with_comment(statement, ["route"], scope_of("a"), False) == expected


@pytest.mark.parametrize(
    "trace",
    ["", "nonsense", f"{TRACE}-00", f"{TRACE}-zz", "*/-*/-*/-01", f"{TRACE}-01-{'more' * 9000}"],
    ids=range(6),
)
def test_only_a_sampled_trace_is_in_the_comment(trace: str) -> None:
    statement = with_comment("SELECT 1", ["traceparent"], scope_of("a", trace), False)
    assert statement == "SELECT 1"


def test_the_span_here_is_the_parent_if_opentelemetry_has_one() -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("request") as span:
        span_id = f"{span.get_span_context().span_id:016x}"
        statement = with_comment("SELECT 1", ["traceparent"], scope_of("a", f"{TRACE}-01"), False)
    assert re.search(f"-{span_id}-0[13]'", statement)  # 2: its ID is random
    assert TRACE not in statement


def test_without_a_route_there_is_no_comment() -> None:
    assert with_comment("SELECT 1", ["route"], {}, False) == "SELECT 1"


async def test_the_database_sees_the_route_and_the_driver_no_parameter_in_it(store: Store) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    app.add_middleware(ASGIRequestReportMiddleware, sql_comments={"route"})

    @app.post("/items/{name}")
    async def create(name: str) -> list[str]:
        await add(store.connect, name, f"{name}%s")
        session = await db_session(store.connect)
        await session.execute(text("SELECT name FROM item WHERE name LIKE :name"), {"name": "%"})
        connection = await session.connection()
        options = {"no_parameters": True}
        await connection.exec_driver_sql("SELECT 1 % 2", execution_options=options)
        if store.driver == "aiosqlite":
            return []
        query = "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        unformatted = await connection.exec_driver_sql(query, execution_options=options)
        return [str(await session.scalar(text(query))), str(unformatted.scalar())]

    async with http_client(app) as client:
        response = await client.post("/items/a")
    assert response.status_code == 200
    assert await store.names() == ["a", "a%s"]
    for query in response.json():
        assert query.endswith("/*route='%2Fitems%2F%7Bname%7D'*/")
    assert len(response.json()) == (0 if store.driver == "aiosqlite" else 2)


async def test_one_route_is_prepared_once_by_asyncpg(connect: DBConnect) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    app.add_middleware(ASGIRequestReportMiddleware, sql_comments={"route", "traceparent"})

    @app.get("/prepared")
    async def count() -> int:
        session = await db_session(connect)
        await session.execute(text("SELECT 1 AS one"))
        query = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 1 AS%'"
        return int(await session.scalar(text(query)) or 0)

    async with http_client(app) as client:
        counts = [(await client.get("/prepared")).json() for _ in range(3)]
        assert counts == [1, 1, 1]
        trace = {"traceparent": f"{TRACE}-01"}
        assert (await client.get("/prepared", headers=trace)).json() == 2


async def test_what_a_comment_costs_is_what_the_page_says(
    database_url: URL, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    app.add_middleware(ASGIRequestReportMiddleware, sql_comments={"route", "traceparent"})
    async with opened(database_url) as (connect, wire), http_client(app) as client:

        @app.get("/select")
        async def select() -> None:
            await (await db_session(connect)).execute(text("SELECT 1 AS one"))

        async def trips(**headers: str) -> list[Trip]:
            wire.start()
            await client.get("/select", headers=headers)
            return wire.trips.copy()

        await trips()
        flown = await trips()
        assert [begin for begin, _ in flown] == ["BEGIN;", ""]
        prepared = await trips(traceparent=f"{TRACE}-01")
        assert [begin for begin, _ in prepared] == [""] * 4
        assert prepared[0][1].startswith("BEGIN")
        assert len(await trips(traceparent=f"{TRACE}-00")) == 2
