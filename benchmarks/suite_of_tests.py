"""What it costs to isolate the tests of a user's suite: a shared transaction, or truncation.

A suite of 100 tests, each one request with an INSERT and a SELECT, on PostgreSQL with several
numbers of tables. The rounds are interleaved in one run; the ratio of their times is reported.
BENCH_DATABASE_URL=postgresql://… uses another server; its tables named bench_… are dropped.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable

import httpx
from sqlalchemy import ForeignKey, Integer, MetaData, String, Table, func, insert, select, text
from sqlalchemy.schema import Column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.postgres import free_port, new_server

ROUNDS = 7
TESTS = 100
TABLES = (10, 20, 40)


def make_tables(count: int) -> list[Table]:
    """Return tables, each with a reference to the one before it."""
    metadata = MetaData()
    return [
        Table(
            f"bench_{number}",
            metadata,
            Column("id", Integer, primary_key=True),
            Column("name", String(50), unique=True, nullable=False),
            Column("parent", ForeignKey(f"bench_{max(number - 1, 0)}.id")),
        )
        for number in range(count)
    ]


def make_app(connect: DBConnect, table: Table) -> Starlette:
    async def add(request: Request) -> JSONResponse:
        session = await db_session(connect)
        await session.execute(insert(table).values(name=request.path_params["name"]))
        return JSONResponse(await session.scalar(select(func.count()).select_from(table)))

    app = Starlette(routes=[Route("/{name}", add)])
    add_starlette_http_db_session_middleware(app)
    return app


async def measure(run_test: Callable[[], Awaitable[None]]) -> float:
    """Return how long the suite takes, in milliseconds."""
    start = time.perf_counter()
    for _ in range(TESTS):
        await run_test()
    return (time.perf_counter() - start) * 1e3


async def compare(connect: DBConnect, tables: list[Table]) -> list[tuple[float, float]]:
    """Return the times of each round: in a shared transaction, and with truncation."""
    names = ", ".join(table.name for table in tables)
    transport = httpx.ASGITransport(app=make_app(connect, tables[0]))
    client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def request() -> None:
        response = await client.get("/ann")
        assert response.json() == 1, "the tests are not isolated"

    async def in_transaction() -> None:
        async with shared_transaction(connect):
            await request()

    async def with_truncation() -> None:
        await request()
        async with new_non_ctx_atomic_session(connect) as session:
            await session.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))

    rounds = []
    async with client:
        for number in range(ROUNDS + 1):
            # Each goes first in every second round.
            order = [in_transaction, with_truncation][:: 1 if number % 2 else -1]
            times = {run_test: await measure(run_test) for run_test in order}
            rounds.append((times[in_transaction], times[with_truncation]))
    return rounds[1:]  # the first one warms up


async def main(url: str) -> None:
    print(f"{TESTS} tests   shared transaction    truncation    ratio (all rounds)")
    for count in TABLES:
        tables = make_tables(count)
        metadata = tables[0].metadata
        async with DBConnect.from_url(url) as connect:
            async with new_non_ctx_atomic_session(connect) as session:
                connection = await session.connection()
                await connection.run_sync(metadata.drop_all)
                await connection.run_sync(metadata.create_all)
            try:
                rounds = await compare(connect, tables)
            finally:
                async with new_non_ctx_atomic_session(connect) as session:
                    await (await session.connection()).run_sync(metadata.drop_all)
        ratios = sorted(truncation / transaction for transaction, truncation in rounds)
        transaction, truncation = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"{count:3} tables  {transaction:15.0f} ms {truncation:10.0f} ms"
            f" {statistics.median(ratios):8.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        )


if __name__ == "__main__":
    if "BENCH_DATABASE_URL" in os.environ:
        asyncio.run(main(os.environ["BENCH_DATABASE_URL"]))
    else:
        with new_server("127.0.0.1", free_port(), "-c fsync=on") as server:  # its default
            asyncio.run(main(server.url))
