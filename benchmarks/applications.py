"""The applications: how each contender gives a request its session, following its documentation."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeAlias

from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.frameworks import Framework, Handler, build_fastapi
from benchmarks.work import RAW_STEPS, Step
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send

OpenApp: TypeAlias = Callable[..., AbstractAsyncContextManager[ASGIApp]]
"""Open the application for a database URL, with the options of its engine."""

VERSION_2 = Path(sys.prefix) / "context-async-sqlalchemy 2.1.9"  # `make bench` installs it here
SET = text("SELECT set_config('app.tenant', :t, true), set_config('statement_timeout', :s, true)")


@asynccontextmanager
async def sessionmaker(url: str, options: Any) -> AsyncGenerator[async_sessionmaker[AsyncSession]]:
    engine = create_async_engine(url, **options)
    yield async_sessionmaker(engine, expire_on_commit=False)
    await engine.dispose()


async def do(steps: tuple[Step, ...], session: object) -> int:
    return sum([await step(session) for step in steps])


@asynccontextmanager
async def this_library(
    framework: Framework, url: str, *, middleware: Any = MappingProxyType({}), **options: Any
) -> AsyncGenerator[ASGIApp]:
    from context_async_sqlalchemy import DBConnect, db_session

    async with DBConnect.from_url(url, **options) as connect:
        app = framework.build(partial(_asking, db_session, connect))
        yield framework.add_library(app, **middleware)


@asynccontextmanager
async def this_library_watched(
    framework: Framework, url: str, **options: Any
) -> AsyncGenerator[ASGIApp]:
    from context_async_sqlalchemy.observability import ASGIRequestReportMiddleware

    async with this_library(framework, url, **options) as app:
        yield ASGIRequestReportMiddleware(
            app, report=lambda _: None, slow_query_threshold=60.0, sql_comments={"route"}
        )


@asynccontextmanager
async def this_library_limited(
    framework: Framework, url: str, **options: Any
) -> AsyncGenerator[ASGIApp]:
    from context_async_sqlalchemy.asgi_utils import RequestLimitsMiddleware, deadline_settings

    async with this_library(
        framework, url, transaction_settings=deadline_settings, **options
    ) as app:
        yield RequestLimitsMiddleware(app, timeout=60.0, cancel_on_disconnect={"GET"})


@asynccontextmanager
async def this_library_with_keys(
    framework: Framework, url: str, **options: Any
) -> AsyncGenerator[ASGIApp]:
    from context_async_sqlalchemy import DBConnect, db_session, new_non_ctx_atomic_session
    from context_async_sqlalchemy.idempotency import IdempotencyMiddleware, idempotency_table

    table = idempotency_table(MetaData(), "bench_key")
    async with DBConnect.from_url(url, **options) as connect:
        async with new_non_ctx_atomic_session(connect) as session:
            await session.run_sync(lambda s: table.metadata.create_all(s.connection()))
        app = framework.build(partial(_asking, db_session, connect))
        app.add_middleware(
            IdempotencyMiddleware,
            connect=connect,
            table=table,
            caller=lambda _: "",
            methods={"GET"},
        )
        app = framework.add_library(app)
        numbers = itertools.count()

        async def with_key(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/insert":  # a streamed answer cannot be stored
                key = (b"idempotency-key", b'"%d"' % next(numbers))
                scope["headers"] = [*scope["headers"], key]
            await app(scope, receive, send)

        yield with_key
        async with new_non_ctx_atomic_session(connect) as session:
            await session.run_sync(lambda s: table.metadata.drop_all(s.connection()))


@asynccontextmanager
async def by_version_2(url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    package, utils = _import_version_2()
    async with sessionmaker(url, options) as maker:
        connect = package.DBConnect(lambda _: maker.kw["bind"], lambda _: maker, host="any")
        app = build_fastapi(partial(_asking, package.db_session, connect))
        utils.add_fastapi_http_db_session_middleware(app)
        yield app


def _asking(db_session: Any, connect: Any, steps: tuple[Step, ...]) -> Handler:
    async def ask(step: Step) -> int:
        return await step(await db_session(connect))

    async def handle() -> int:
        return sum([await ask(step) for step in steps])

    return handle


def _import_version_2() -> tuple[Any, Any]:
    """Import the version that has the same name as this package, beside it."""
    package = "context_async_sqlalchemy"

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] == package]
        return {name: sys.modules.pop(name) for name in names}

    own = take_out()
    sys.path.insert(0, str(VERSION_2))
    try:
        return import_module(package), import_module(f"{package}.fastapi_utils")
    finally:
        sys.path.remove(str(VERSION_2))
        take_out()
        sys.modules.update(own)


@asynccontextmanager
async def by_hand(framework: Framework, url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    def make_handler(steps: tuple[Step, ...]) -> Handler:
        async def handle() -> int:
            async with maker() as session, session.begin():
                return await do(steps, session)

        return handle

    async with sessionmaker(url, options) as maker:
        yield framework.build(make_handler)


@asynccontextmanager
async def with_settings_by_hand(url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    def make_handler(steps: tuple[Step, ...]) -> Handler:
        async def handle() -> int:
            async with maker() as session, session.begin():
                await session.execute(SET, {"t": "1", "s": "2s"})
                return await do(steps, session)

        return handle

    async with sessionmaker(url, options) as maker:
        yield build_fastapi(make_handler)


@asynccontextmanager
async def careless(framework: Framework, url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    def make_handler(steps: tuple[Step, ...]) -> Handler:
        async def handle() -> int:
            session = maker()
            answer = await do(steps, session)
            await session.commit()
            return answer

        return handle

    async with sessionmaker(url, options) as maker:
        yield framework.build(make_handler)


@asynccontextmanager
async def by_asyncpg(framework: Framework, url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    import asyncpg

    async def leave(_: object) -> None:
        """Send nothing when a connection is returned: SQLAlchemy's pool does not either."""

    def make_handler(steps: tuple[Step, ...]) -> Handler:
        raw_steps = tuple(RAW_STEPS[step] for step in steps)

        async def handle() -> int:
            async with pool.acquire() as connection, connection.transaction():
                return await do(raw_steps, connection)

        return handle

    dsn = url.replace("+asyncpg", "")
    async with asyncpg.create_pool(
        dsn, min_size=0, max_size=options["pool_size"], reset=leave
    ) as pool:
        yield framework.build(make_handler)


@asynccontextmanager
async def by_depends(scope: Any, url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    from fastapi import Depends

    async def get_session() -> AsyncGenerator[AsyncSession]:
        async with maker() as session, session.begin():
            yield session

    async with sessionmaker(url, options) as maker:
        yield build_fastapi(partial(_with_parameter, Depends(get_session, scope=scope)))


@asynccontextmanager
async def by_fastapi_async_sqlalchemy(url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

    middleware, db = create_middleware_and_session_proxy()

    def make_handler(steps: tuple[Step, ...]) -> Handler:
        async def child(step: Step) -> int:
            return await step(db.session)

        async def handle() -> int:
            return sum([await child(step) for step in steps])

        return handle

    async with sessionmaker(url, options) as maker:
        app = build_fastapi(make_handler)
        app.add_middleware(middleware, custom_engine=maker.kw["bind"], commit_on_exit=True)
        yield app


@asynccontextmanager
async def by_advanced_alchemy(url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    from advanced_alchemy.extensions.fastapi import (
        AdvancedAlchemy,
        AsyncSessionConfig,
        SQLAlchemyAsyncConfig,
    )
    from fastapi import Depends

    async with sessionmaker(url, options) as maker:
        config = SQLAlchemyAsyncConfig(
            engine_instance=maker.kw["bind"],
            session_config=AsyncSessionConfig(expire_on_commit=False),
            commit_mode="autocommit",
        )
        alchemy = AdvancedAlchemy(config)
        app = build_fastapi(partial(_with_parameter, Depends(alchemy.provide_session())))
        alchemy.init_app(app)
        yield app


@asynccontextmanager
async def by_fastapi_sqla(url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    # It is configured only by the environment.
    settings = {f"sqlalchemy_{name}": str(value) for name, value in options.items()}
    settings["sqlalchemy_url"] = url
    os.environ.update(settings)
    import fastapi_sqla
    import structlog
    from fastapi import Depends

    quiet = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=quiet)

    app = build_fastapi(partial(_with_parameter, Depends(fastapi_sqla.AsyncSessionDependency())))
    fastapi_sqla.setup_middlewares(app)
    await fastapi_sqla.startup()
    for name in settings:
        del os.environ[name]
    yield app
    async with fastapi_sqla.open_async_session() as session:
        engine = session.bind
    await engine.dispose()


def _with_parameter(dependency: Any, steps: tuple[Step, ...]) -> Handler:
    async def handle(session: AsyncSession = dependency) -> int:
        return await do(steps, session)

    return handle
