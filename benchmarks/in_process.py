"""Measurements in this process: CPU and wall time of a request, memory, several databases."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks import work
from benchmarks.contenders import AUTOCOMMIT, LEAST, LIMIT, Contender, sessionmaker, taking_part
from benchmarks.frameworks import Handler, build_asgi
from benchmarks.requests import measure, request
from benchmarks.run import Run, rotated
from benchmarks.work import read
from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.asgi_types import ASGIApp

ROUTES = ("nothing", "select", "insert", "five", "change")
REQUESTS = {"nothing": 1_000}
OTHER_REQUESTS = 60
IN_FLIGHT = 500
POOL: Any = {"pool_size": 10, "max_overflow": 0}


@asynccontextmanager
async def all_apps(run: Run) -> AsyncGenerator[dict[Contender, ASGIApp]]:
    async with AsyncExitStack() as stack:
        apps = {
            contender: await stack.enter_async_context(contender.open_app(run.url, **POOL))
            for contender in taking_part(autocommit=True)
        }
        gc.freeze()  # the collection before each measurement skips them
        yield apps
        gc.unfreeze()


async def measure_time(run: Run, apps: dict[Contender, ASGIApp]) -> None:
    for route in ROUTES:
        contenders = [c for c in apps if route == "select" or not c.name.endswith(AUTOCOMMIT)]
        requests = REQUESTS.get(route, OTHER_REQUESTS) // (2 if run.is_quick else 1)
        for contender in contenders:
            await measure(apps[contender], f"/{route}", 20)
        for number in run.rounds(f"in process: {route}", 15, 5):
            for contender in rotated(contenders, number):
                cpu, wall = await measure(apps[contender], f"/{route}", requests)
                run.add("cpu", contender.key, route, cpu)
                run.add("wall", contender.key, route, wall)


async def measure_memory(run: Run, apps: dict[Contender, ASGIApp]) -> None:
    contenders = [
        c for c in apps if c.name not in (LIMIT, LEAST) and not c.name.endswith(AUTOCOMMIT)
    ]
    for contender in contenders:
        await _memory_of(apps[contender])  # fills caches
    for number in run.rounds("memory", 3, 1):
        for contender in rotated(contenders, number):
            run.add("memory", contender.key, "in flight", await _memory_of(apps[contender]))


async def _memory_of(app: ASGIApp) -> float:
    """Return the memory that a request in flight takes, in KiB."""
    work.gate = work.Gate()
    gc.collect()
    tracemalloc.start()
    tasks = [asyncio.create_task(request(app, "/wait")) for _ in range(IN_FLIGHT)]
    while work.gate.waiting < IN_FLIGHT:
        await asyncio.sleep(0.001)
    gc.collect()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    work.gate.is_open.set()
    await asyncio.gather(*tasks)
    return taken / IN_FLIGHT / 1024


async def measure_connects(run: Run) -> None:
    """Measure requests that read from 1 to 8 databases, with one connect for each."""
    for count in (1, 2, 4, 8):
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            options: Any = {"pool_size": 1}
            makers = [await enter(sessionmaker(run.url, options)) for _ in range(count)]
            connects = [await enter(DBConnect.from_url(run.url, **options)) for _ in range(count)]
            apps: dict[str, ASGIApp] = {
                "ASGI: by hand": build_asgi(partial(_read_by_hand, makers)),
                "ASGI: this library": ASGIHTTPDBSessionMiddleware(
                    build_asgi(partial(_read_by_library, connects))
                ),
            }
            for app in apps.values():
                await measure(app, "/select", 10)
            for number in run.rounds(f"databases in a request: {count}", 20, 4):
                for key in rotated(list(apps), number):
                    cpu, _ = await measure(apps[key], "/select", OTHER_REQUESTS // count)
                    run.add("connects", key, str(count), cpu)


def _read_by_hand(makers: list[async_sessionmaker[AsyncSession]], _: object) -> Handler:
    async def handle() -> int:
        answer = 0
        async with AsyncExitStack() as stack:
            for maker in makers:
                session = await stack.enter_async_context(maker())
                await stack.enter_async_context(session.begin())
                answer += await read(session)
        return answer

    return handle


def _read_by_library(connects: list[DBConnect], _: object) -> Handler:
    async def handle() -> int:
        return sum([await read(await db_session(connect)) for connect in connects])

    return handle


async def measure_calls(run: Run) -> None:
    """Measure `await db_session(connect)` when the session already exists."""

    async def empty() -> None: ...

    calls = 10_000
    async with DBConnect.from_url(run.url) as connect, new_db_session_ctx():
        await db_session(connect)
        for _ in run.rounds("repeated db_session", 30, 10):
            start = time.process_time()
            for _ in range(calls):
                await empty()
            middle = time.process_time()
            for _ in range(calls):
                await db_session(connect)
            end = time.process_time()
            run.add("calls", "await of an empty coroutine", "call", (middle - start) / calls * 1e9)
            run.add("calls", "await db_session(connect)", "call", (end - middle) / calls * 1e9)
