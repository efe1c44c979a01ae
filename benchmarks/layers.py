"""What a request is made of: from the bare minimum to this library, layer by layer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar

from benchmarks.applications import do
from benchmarks.contenders import BY_KEY, FLOOR, LEAST, LIBRARY, LIMIT
from benchmarks.frameworks import FRAMEWORKS, Handler, build_asgi
from benchmarks.in_process import OTHER_REQUESTS, POOL, REQUESTS
from benchmarks.requests import measure
from benchmarks.run import Run, rotated
from benchmarks.work import Step
from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send

_variable: ContextVar[object] = ContextVar("variable", default=None)


def with_send(app: ASGIApp) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            await send(message)

        await app(scope, receive, send_on)

    return call


def with_variable(app: ASGIApp) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        token = _variable.set(scope)
        try:
            await app(scope, receive, send)
        finally:
            _variable.reset(token)

    return call


@asynccontextmanager
async def _apps(run: Run) -> AsyncGenerator[dict[str, ASGIApp]]:
    async with AsyncExitStack() as stack:
        connect = await stack.enter_async_context(DBConnect.from_url(run.url, **POOL))
        maker = await connect.session_maker()

        def open_(steps: tuple[Step, ...]) -> Handler:
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
                session.sync_session.close()
                return answer

            return handle

        def in_context(steps: tuple[Step, ...]) -> Handler:
            async def handle() -> int:
                async with new_db_session_ctx():
                    return await do(steps, await db_session(connect))

            return handle

        async def of(name: str) -> ASGIApp:
            return await stack.enter_async_context(
                BY_KEY[f"ASGI: {name}"].open_app(run.url, **POOL)
            )

        yield {
            f"ASGI: {LIMIT}": await of(LIMIT),
            f"ASGI: {LEAST}": await of(LEAST),
            "ASGI: + the engine of a connect": build_asgi(open_),
            "ASGI: + close()": build_asgi(closed),
            "ASGI: + a context, db_session, settling": build_asgi(in_context),
            f"ASGI: {LIBRARY}": await of(LIBRARY),
            f"ASGI: {FLOOR}": await of(FLOOR),
        }


async def measure_layers(run: Run) -> None:
    async with _apps(run) as apps:
        for route in ("select", "insert"):
            await _measure(run, "layers", apps, route, OTHER_REQUESTS)


async def measure_empty_layers(run: Run) -> None:
    """Measure a request that asks for no session, with each framework."""
    for name, framework in FRAMEWORKS.items():
        bare = framework.build(_no_handler)
        apps = {
            f"{name}: {FLOOR}": bare,
            f"{name}: + a send": with_send(bare),
            f"{name}: + a context variable": with_variable(with_send(bare)),
            f"{name}: {LIBRARY}": framework.add_library(framework.build(_no_handler)),
        }
        await _measure(run, "empty", apps, "nothing", REQUESTS["nothing"])


def _no_handler(_: tuple[Step, ...]) -> Handler:
    async def handle() -> int:
        return 0

    return handle


async def _measure(
    run: Run, section: str, apps: dict[str, ASGIApp], route: str, requests: int
) -> None:
    for app in apps.values():
        await measure(app, f"/{route}", 20)
    for number in run.rounds(f"{section}: {route}", 25):
        for key in rotated(list(apps), number):
            cpu, _ = await measure(apps[key], f"/{route}", requests)
            run.add(section, key, route, cpu)
