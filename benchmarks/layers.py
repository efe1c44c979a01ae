"""What a request is made of: from raw asyncpg to this library, one layer after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from benchmarks.contenders import BY_KEY, FLOOR, LEAST, LIBRARY, LIMIT, do
from benchmarks.frameworks import Handler, MakeHandler, build_asgi
from benchmarks.in_process import OTHER_REQUESTS, POOL
from benchmarks.requests import measure
from benchmarks.run import Run, rotated
from benchmarks.work import Step
from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.asgi_types import ASGIApp


@asynccontextmanager
async def _apps(run: Run) -> AsyncGenerator[dict[str, ASGIApp]]:
    async with AsyncExitStack() as stack:
        connect = await stack.enter_async_context(DBConnect.from_url(run.url, **POOL))
        maker = await connect.session_maker()

        def guarded(steps: tuple[Step, ...]) -> Handler:
            async def handle() -> int:
                session = maker()
                answer = await do(steps, session)
                await session.commit()
                return answer

            return handle

        def closed(steps: tuple[Step, ...]) -> Handler:
            async def handle() -> int:
                session = maker()
                answer = await do(steps, session)
                await session.commit()
                await session.close()
                return answer

            return handle

        def in_context(steps: tuple[Step, ...]) -> Handler:
            async def handle() -> int:
                async with new_db_session_ctx():
                    session = await db_session(connect)
                    answer = await do(steps, session)
                    await session.commit()
                    return answer

            return handle

        layers: dict[str, MakeHandler] = {
            "+ the engine of a connect": guarded,
            "+ close()": closed,
            "+ a context, db_session": in_context,
        }
        apps = {}
        for name in (LIMIT, LEAST):
            apps[name] = await stack.enter_async_context(
                BY_KEY[f"ASGI: {name}"].open_app(run.url, **POOL)
            )
        apps |= {name: build_asgi(make_handler) for name, make_handler in layers.items()}
        for name in (LIBRARY, FLOOR):
            apps[name] = await stack.enter_async_context(
                BY_KEY[f"ASGI: {name}"].open_app(run.url, **POOL)
            )
        yield {f"ASGI: {name}": app for name, app in apps.items()}


async def measure_layers(run: Run) -> None:
    async with _apps(run) as apps:
        for route in ("select", "insert"):
            for app in apps.values():
                await measure(app, f"/{route}", 20)
            for number in run.rounds(f"layers: {route}", 25, 5):
                for key in rotated(list(apps), number):
                    cpu, _ = await measure(apps[key], f"/{route}", OTHER_REQUESTS)
                    run.add("layers", key, route, cpu)
