"""The creators of a connect that is made from a database URL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from context_async_sqlalchemy.engine import (
    EngineOptions,
    check_idle_options,
    create_engine,
    parse_url,
    set_host,
)
from context_async_sqlalchemy.pools import close_idle_connections
from context_async_sqlalchemy.session_type import SessionOptions, SessionT


class Creators(NamedTuple, Generic[SessionT]):
    """What `DBConnect` takes.

    Attributes:
        engine: Makes the engine for a host; None is the host of the URL.
        session_maker: Makes the sessionmaker for an engine.
        host: The host of the URL, if it has one.
    """

    engine: Callable[[str | None], AsyncEngine]
    session_maker: Callable[[AsyncEngine], async_sessionmaker[SessionT]]
    host: str | None


def creators_from_url(
    url: str | URL,
    password: str | None,
    session_options: SessionOptions[SessionT] | None,
    ping_after_idle: float,
    idle_timeout: float | None,
    min_idle: int,
    engine_options: EngineOptions,
) -> Creators[SessionT]:
    """Make the creators that `DBConnect.from_url` describes, and try them; opens nothing."""
    database = parse_url(url, password)
    options: dict[str, Any] = {"expire_on_commit": False, **(session_options or {})}
    if idle_timeout is not None:
        check_idle_options(database, idle_timeout, min_idle, engine_options.get("poolclass"))
        engine_options.setdefault("pool_use_lifo", True)
    elif min_idle:
        raise ValueError("min_idle needs an idle_timeout")

    def make_engine(host: str | None) -> AsyncEngine:
        engine = create_engine(
            set_host(database, host), ping_after_idle=ping_after_idle, **engine_options.copy()
        )
        if idle_timeout is not None:
            close_idle_connections(engine, idle_timeout, min_idle)
        return engine

    def make_session_maker(engine: AsyncEngine) -> async_sessionmaker[SessionT]:
        return async_sessionmaker(engine, **options)

    # An error is raised now, not when the first session is made.
    make_session_maker(make_engine(database.host))()
    return Creators(make_engine, make_session_maker, database.host)
