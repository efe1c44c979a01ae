"""The contenders: how each gives a request its session, following its documentation."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.frameworks import FRAMEWORKS, Framework, Handler, build_fastapi
from benchmarks.work import RAW_STEPS, Step
from context_async_sqlalchemy.asgi_types import ASGIApp

OpenApp: TypeAlias = Callable[..., AbstractAsyncContextManager[ASGIApp]]
"""Open the application for a database URL, with the options of its engine."""

LIBRARY, FLOOR, LEAST, LIMIT = "this library", "by hand", "no error handling", "raw asyncpg"
AUTOCOMMIT = ", AUTOCOMMIT"


class Contender(NamedTuple):
    """A contender with a framework."""

    framework: str
    name: str
    open_app: OpenApp
    differs: str
    package: str = ""

    @property
    def key(self) -> str:
        """Its name on the command line and in the results."""
        return f"{self.framework}: {self.name}"

    def obstacle(self) -> str | None:
        """Return why it cannot take part here, or None."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed: it does not go with these versions"
        if self.name.startswith("Depends"):
            import fastapi

            if "scope" not in inspect.signature(fastapi.Depends).parameters:
                return f"FastAPI {fastapi.__version__} has no scopes of dependencies"
        return None


@asynccontextmanager
async def sessionmaker(url: str, options: Any) -> AsyncGenerator[async_sessionmaker[AsyncSession]]:
    engine = create_async_engine(url, **options)
    yield async_sessionmaker(engine, expire_on_commit=False)
    await engine.dispose()


async def do(steps: tuple[Step, ...], session: object) -> int:
    return sum([await step(session) for step in steps])


@asynccontextmanager
async def this_library(framework: Framework, url: str, **options: Any) -> AsyncGenerator[ASGIApp]:
    from context_async_sqlalchemy import DBConnect, db_session

    async def ask(step: Step) -> int:
        return await step(await db_session(connect))

    def make_handler(steps: tuple[Step, ...]) -> Handler:
        async def handle() -> int:
            return sum([await ask(step) for step in steps])

        return handle

    async with DBConnect.from_url(url, **options) as connect:
        yield framework.add_library(framework.build(make_handler))


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


def _autocommit(open_app: OpenApp) -> OpenApp:
    return partial(open_app, isolation_level="AUTOCOMMIT")


def _of_framework(name: str, framework: Framework) -> list[Contender]:
    library, hand = partial(this_library, framework), partial(by_hand, framework)
    return [
        Contender(name, FLOOR, hand, "The floor: `async with maker() as s, s.begin()`."),
        Contender(name, LIBRARY, library, "Commits before the response starts."),
        Contender(
            name,
            LEAST,
            partial(careless, framework),
            "Not for use: `maker()`, the statements and `commit()`, without error handling. This "
            "is the minimum with an `AsyncSession`.",
        ),
        Contender(
            name,
            LIMIT,
            partial(by_asyncpg, framework),
            "The limit: no SQLAlchemy, the same SQL written out, and a pool that resets nothing.",
        ),
        Contender(name, FLOOR + AUTOCOMMIT, _autocommit(hand), "Only for reads: no transaction."),
        Contender(
            name, LIBRARY + AUTOCOMMIT, _autocommit(library), "Only for reads: no transaction."
        ),
    ]


CONTENDERS = [
    *(c for name, framework in FRAMEWORKS.items() for c in _of_framework(name, framework)),
    Contender(
        "FastAPI",
        "Depends, scope request",
        partial(by_depends, "request"),
        "Commits after the response was sent; holds the connection until then.",
    ),
    Contender(
        "FastAPI",
        "Depends, scope function",
        partial(by_depends, "function"),
        "Commits when the handler has returned, before the response; every layer passes the "
        "session on.",
    ),
    Contender(
        "FastAPI",
        "fastapi-async-sqlalchemy",
        by_fastapi_async_sqlalchemy,
        "Commits before the response, which it holds back until the first part of the body.",
        "fastapi_async_sqlalchemy",
    ),
    Contender(
        "FastAPI",
        "advanced-alchemy",
        by_advanced_alchemy,
        "Commits after the response was sent, and only logs a failure (as debug); the session is "
        "provided by a sync dependency, which FastAPI runs in a thread.",
        "advanced_alchemy",
    ),
    Contender(
        "FastAPI",
        "fastapi-sqla",
        by_fastapi_sqla,
        "Commits before the response starts, then again at its end; the session is provided by a "
        "sync dependency, which FastAPI runs in a thread.",
        "fastapi_sqla",
    ),
]
BY_KEY = {contender.key: contender for contender in CONTENDERS}


def taking_part(*, autocommit: bool = False) -> list[Contender]:
    """Return the contenders that can take part here, with or without the read-only ones."""
    return [
        c
        for c in CONTENDERS
        if c.obstacle() is None and (autocommit or not c.name.endswith(AUTOCOMMIT))
    ]
