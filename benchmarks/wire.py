"""What goes over the wire: the round trips of a request, and their statements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import make_url

from benchmarks.contenders import BY_KEY, LEAST, Contender, taking_part
from benchmarks.requests import measure, request
from benchmarks.run import Run, rotated
from benchmarks.work import CREATE, DROP, ROUTES
from context_async_sqlalchemy.asgi_types import ASGIApp
from tests.helpers.proxy import Call, Fault, proxy

WARM_UP = 3
_ENDS = (
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SELECT set_config",
    "SELECT xid",
    "WITH before",
    "UPDATE bench_key",
)


@asynccontextmanager
async def tables(url: str) -> AsyncGenerator[asyncpg.Connection]:
    """Make the tables anew; yields a separate connection, and drops them at the end."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(CREATE)
        yield connection
        await connection.execute(DROP)
    finally:
        await connection.close()


@asynccontextmanager
async def watched(
    contender: Contender, url: str, seconds: float = 0, **options: Any
) -> AsyncGenerator[tuple[ASGIApp, list[str]]]:
    """Open the application of a contender; yields it, and the statements that it sends.

    Args:
        contender: The contender.
        url: The URL of the database.
        seconds: How much to delay each round trip. Default 0.
        **options: The options of its engine.
    """
    seen: list[str] = []

    async def note(call: Call) -> Fault | None:
        seen.append(call.statement)
        if seconds:
            await asyncio.sleep(seconds)
        return None

    server = make_url(url)
    assert server.host is not None
    async with proxy(server.host, server.port or 5432, note, with_set_up=True) as port:
        through = server.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        async with contender.open_app(through, **{"pool_size": 1} | options) as app:
            yield app, seen


async def calls_of(app: ASGIApp, seen: list[str], path: str) -> list[str]:
    """Return the statement of each round trip of one request on a warm connection."""
    for _ in range(WARM_UP):
        await request(app, path)
    seen.clear()
    await request(app, path)
    return seen.copy()


def work_of(calls: list[str]) -> list[str]:
    """Return the calls that neither begin, nor set up, nor end a transaction."""
    return [call for call in calls if not call.startswith(_ENDS)]


async def measure_trips(run: Run) -> None:
    """Count the round trips of a request on a warm connection, for each contender."""
    rows: list[tuple[str, Contender, dict[str, Any]]]
    rows = [(c.key, c, {}) for c in taking_part(partly=True)]
    for key in ("FastAPI: by hand", "FastAPI: this library"):
        rows.append((f"{key}, pool_pre_ping", BY_KEY[key], {"pool_pre_ping": True}))
    for number in run.rounds("round trips", len(rows), always=True):
        key, contender, options = rows[number]
        async with watched(contender, run.url, **options) as (app, seen):
            for route in ROUTES:
                if route in contender.routes:
                    run.add("trips", key, route, len(await calls_of(app, seen, f"/{route}")))


async def measure_distance(run: Run) -> None:
    """Measure requests to a server that is 1 ms away."""
    async with AsyncExitStack() as stack:
        apps = {}
        for contender in taking_part(partly=True):
            if contender.framework == "FastAPI" and contender.name != LEAST:
                near = watched(contender, run.url, seconds=0.001)
                apps[contender], _ = await stack.enter_async_context(near)
        for route in ROUTES[1:]:
            able = [contender for contender in apps if route in contender.routes]
            for contender in able:
                await measure(apps[contender], f"/{route}", 10)
            for number in run.rounds(f"a server 1 ms away: {route}", 10):
                for contender in rotated(able, number):
                    _, wall = await measure(apps[contender], f"/{route}", 10)
                    run.add("distance", contender.key, route, wall)
