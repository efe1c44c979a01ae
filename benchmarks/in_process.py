"""Measurements in this process: the CPU time of a request, its memory, and uvloop."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks import work
from benchmarks.contenders import BY_KEY, FLOOR, LEAST, LIBRARY, LIMIT, Contender, taking_part
from benchmarks.requests import measure, request
from benchmarks.run import Run, rotated
from benchmarks.work import ROUTES
from context_async_sqlalchemy.asgi_types import ASGIApp

REQUESTS = {"nothing": 1_000}
OTHER_REQUESTS = 60
IN_FLIGHT = 500
POOL: Any = {"pool_size": 10, "max_overflow": 0}


@asynccontextmanager
async def _all_apps(run: Run) -> AsyncGenerator[dict[Contender, ASGIApp]]:
    async with AsyncExitStack() as stack:
        apps = {
            contender: await stack.enter_async_context(contender.open_app(run.url, **POOL))
            for contender in taking_part(partly=True)
        }
        gc.freeze()  # the collection before each measurement skips them
        yield apps
        gc.unfreeze()


async def measure_time(run: Run) -> None:
    async with _all_apps(run) as apps:
        for route in ROUTES:
            contenders = [contender for contender in apps if route in contender.routes]
            for contender in contenders:
                await measure(apps[contender], f"/{route}", 20)
            for number in run.rounds(f"in process: {route}", 15):
                for contender in rotated(contenders, number):
                    requests = REQUESTS.get(route, OTHER_REQUESTS)
                    cpu, _ = await measure(apps[contender], f"/{route}", requests)
                    run.add("cpu", contender.key, route, cpu)


async def measure_memory(run: Run) -> None:
    async with _all_apps(run) as apps:
        contenders = [c for c in taking_part() if c.name not in (LIMIT, LEAST)]
        for contender in contenders:
            await _memory_of(apps[contender])  # fills caches
        for number in run.rounds("memory", 3):
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


async def measure_uvloop(run: Run) -> None:
    """Measure requests on uvloop, and on asyncio's own loop in turns."""
    if find_spec("uvloop") is not None:
        await asyncio.to_thread(_measure_loops, run)  # where no loop is running


def _measure_loops(run: Run) -> None:
    import uvloop

    contenders = [BY_KEY[f"FastAPI: {name}"] for name in (FLOOR, LIBRARY, LEAST)]
    with ExitStack() as stack:
        apps = {}
        for suffix, factory in (("", None), (", uvloop", uvloop.new_event_loop)):
            runner = stack.enter_context(asyncio.Runner(loop_factory=factory))
            for contender in contenders:
                opened = contender.open_app(run.url, **POOL)
                app = runner.run(opened.__aenter__())
                stack.callback(partial(_close, runner, opened))
                apps[contender.key + suffix] = runner, app
        for route in ("select", "insert"):
            for number in run.rounds(f"uvloop: {route}", 15):
                for key in rotated(list(apps), number):
                    runner, app = apps[key]
                    cpu, _ = runner.run(measure(app, f"/{route}", OTHER_REQUESTS))
                    run.add("uvloop", key, route, cpu)


def _close(runner: asyncio.Runner, app: AbstractAsyncContextManager[ASGIApp]) -> None:
    runner.run(app.__aexit__(None, None, None))
