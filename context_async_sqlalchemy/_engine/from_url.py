"""An engine, and a sessionmaker for it, from a database URL."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Unpack, cast

from sqlalchemy import URL, Pool, QueuePool
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from context_async_sqlalchemy._engine.begin_in_flight import (
    begin_with_first_statement,
    check_begin_with_first_statement,
)
from context_async_sqlalchemy._engine.fair_pool import fair_pool
from context_async_sqlalchemy._engine.libpq import lets_impostors_in, translate_libpq_url
from context_async_sqlalchemy._engine.log import hide_password, logger
from context_async_sqlalchemy._engine.options import EngineOptions, SessionT, URLOptions
from context_async_sqlalchemy._engine.pool import close_idle_connections, ping_idle_connections
from context_async_sqlalchemy._engine.sqlite import prepare_sqlite
from context_async_sqlalchemy._engine.transaction_settings import (
    begin_with_settings,
    check_transaction_settings,
)
from context_async_sqlalchemy._engine.url import is_in_memory, parse_url, set_host
from context_async_sqlalchemy._engine.verify_commits import check_verify_commits, verify_commits

# Of this package, by the driver that they install.
_EXTRAS = {"asyncpg": "postgresql", "psycopg": "psycopg", "aiosqlite": "sqlite", "asyncmy": "mysql"}

# SQLAlchemy takes any number. -1 means "no limit" to max_overflow, and "never" to pool_recycle.
_MINIMUM = {"pool_size": 0, "max_overflow": -1, "pool_timeout": 0, "pool_recycle": -1}


def creators_from_url(
    url: str | URL, password: str | None, options: URLOptions[SessionT]
) -> tuple[
    Callable[[str | None], AsyncEngine],
    Callable[[AsyncEngine], async_sessionmaker[SessionT]],
    str | None,
]:
    """Return the creators that `DBConnect.from_url` describes, and the URL's host; opens nothing.

    The engine_creator takes None for the host of the URL, which may have none.
    """
    database = parse_url(url, password)
    session_options: dict[str, Any] = {
        "expire_on_commit": False,
        **(options.pop("session_options", None) or {}),
    }
    ping_after_idle = options.pop("ping_after_idle", 1.0)
    idle_timeout, min_idle = options.pop("idle_timeout", None), options.pop("min_idle", 0)
    settings = options.pop("transaction_settings", None)
    max_waiting = options.pop("max_waiting", None)
    begins_with_first = options.pop("begin_with_first_statement", False)
    verifies = options.pop("verify_commits", False)
    verify_timeout = options.pop("verify_timeout", 5.0)
    # What is left, and what nobody knows, which `create_engine` refuses.
    engine_options = cast("EngineOptions", options)
    # echo shows them, and is asked for. `error.params` has them in any case.
    engine_options.setdefault("hide_parameters", not engine_options.get("echo"))
    if idle_timeout is not None:
        _check_idle_options(database, idle_timeout, min_idle, engine_options.get("poolclass"))
        engine_options.setdefault("pool_use_lifo", True)
    elif min_idle:
        raise ValueError("min_idle needs an idle_timeout")
    if settings is not None:
        check_transaction_settings(database, settings, engine_options)
    if max_waiting is not None:
        _check_max_waiting(max_waiting, engine_options)
    if begins_with_first:
        check_begin_with_first_statement(database)
    if verifies:
        check_verify_commits(database, verify_timeout)

    def make_engine(host: str | None) -> AsyncEngine:
        engine = create_engine(
            set_host(database, host),
            ping_after_idle=ping_after_idle,
            max_waiting=max_waiting,
            **engine_options.copy(),
        )
        if idle_timeout is not None:
            close_idle_connections(engine, idle_timeout, min_idle)
        if settings is not None:
            begin_with_settings(engine.sync_engine, settings)
        if begins_with_first:
            begin_with_first_statement(engine.sync_engine)
        if verifies:
            make_another = partial(create_engine, set_host(database, host), **engine_options)
            verify_commits(engine.sync_engine, verify_timeout, make_another)
        return engine

    def make_session_maker(engine: AsyncEngine) -> async_sessionmaker[SessionT]:
        return async_sessionmaker(engine, **session_options)

    # An error is raised now, not when the first session is made.
    try:
        session_maker = make_session_maker(make_engine(None))
        with suppress(LookupError):  # a class whose sessions are a tenant's has none for this one
            session_maker()
        is_ambiguous = False
    except ValueError:
        is_ambiguous = any(
            "@" in value for values in database.normalized_query.values() for value in values
        )
        if not is_ambiguous:
            raise
    if is_ambiguous:  # not in the except clause: what is in the query may be a password
        raise ValueError(
            "the database URL cannot be used: something in its query is not supported, or belongs "
            "to a password with an @, for which %40 is written"
        )
    if database.get_dialect().driver == "asyncpg" and lets_impostors_in(
        database, engine_options.get("connect_args", {})
    ):
        logger.warning(
            "asyncpg has no channel binding, which the URL requires: whoever answers in place of "
            "the server may get the password. Say sslmode=verify-full in the URL"
        )
    return make_engine, make_session_maker, database.host or None


def create_engine(
    url: URL,
    *,
    ping_after_idle: float = 1.0,
    max_waiting: int | None = None,
    **options: Unpack[EngineOptions],
) -> AsyncEngine:
    """Make an engine as `DBConnect.from_url` describes it; opens no connection."""
    _check(ping_after_idle, options)
    has_ping = options.pop("pool_pre_ping", False)
    dialect: Any = url.get_dialect()
    if dialect.driver == "asyncpg":
        url, arguments = translate_libpq_url(url)
        options["connect_args"] = _merge(arguments, options.get("connect_args", {}))
    if (password := url.query.get("sslpassword")) is not None:  # which the URL's repr would show
        url = url.difference_update_query(["sslpassword"])
        options["connect_args"] = {"sslpassword": password} | options.get("connect_args", {})
    if is_in_memory(url) and "poolclass" not in options:
        # SQLAlchemy would give one connection, and its transaction, to all sessions at a time: the
        # rollback of one would undo what another has written.
        options["pool_size"], options["max_overflow"], options["pool_recycle"] = 1, 0, -1
        options["poolclass"] = fair_pool(max_waiting)
    elif issubclass(dialect.get_pool_class(url), QueuePool):
        options.setdefault("poolclass", fair_pool(max_waiting))
    is_sqlite = dialect.name == "sqlite"
    if is_sqlite and "autocommit" in options.get("connect_args", {}):
        raise ValueError("autocommit: say isolation_level='AUTOCOMMIT' instead of this connect_arg")
    engine = _create_async_engine(url, **options)
    if is_sqlite:
        prepare_sqlite(engine.sync_engine)
    if has_ping:
        ping_idle_connections(engine.sync_engine, ping_after_idle)
    return engine


def _check_idle_options(
    url: URL, idle_timeout: float, min_idle: int, poolclass: type[Pool] | None
) -> None:
    if idle_timeout <= 0:
        raise ValueError(f"idle_timeout must be more than 0 seconds, not {idle_timeout}")
    if min_idle < 0:
        raise ValueError(f"min_idle must be at least 0, not {min_idle}")
    if poolclass is not None and not issubclass(poolclass, QueuePool):
        raise ValueError(f"idle_timeout is of no use with {poolclass.__name__}")
    if is_in_memory(url):
        raise ValueError("a database in memory ends with its connection: it takes no idle_timeout")


def _check_max_waiting(max_waiting: int, options: EngineOptions) -> None:
    if not isinstance(max_waiting, int) or isinstance(max_waiting, bool):
        raise TypeError(f"max_waiting must be an int, not {type(max_waiting).__name__}")
    if max_waiting < 0:
        raise ValueError(f"max_waiting must be at least 0, not {max_waiting}")
    if "poolclass" in options:
        raise ValueError("max_waiting is for the pool that from_url makes: leave poolclass out")


def _check(ping_after_idle: float, options: EngineOptions) -> None:
    if unknown := options.keys() - EngineOptions.__optional_keys__:
        raise TypeError(f"there is no engine option {', '.join(map(repr, sorted(unknown)))}")
    for name, minimum in _MINIMUM.items():
        value: Any = options.get(name, minimum)
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, not {type(value).__name__}")
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value}")
    if not ping_after_idle > 0:
        raise ValueError(f"ping_after_idle must be more than 0 seconds, not {ping_after_idle}")


def _merge(arguments: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = arguments | given
    if "server_settings" in arguments:
        settings = given.get("server_settings") or {}
        merged["server_settings"] = arguments["server_settings"] | settings
    return merged


def _create_async_engine(url: URL, **options: Unpack[EngineOptions]) -> AsyncEngine:
    try:
        # Looked up when it is called: OpenTelemetry's instrumentation puts its own in that place.
        return sqlalchemy_asyncio.create_async_engine(url, **options)
    except ModuleNotFoundError as error:
        driver = url.get_dialect().driver
        if error.name != driver:
            raise  # something that an installed driver, or an option, needs
        package = '"psycopg[binary]"' if driver == "psycopg" else driver
        message = f"The driver {driver} is not installed: 'pip install {package}'"
        if driver in _EXTRAS:
            message += f', or install context-async-sqlalchemy with its extra "{_EXTRAS[driver]}"'
        raise ModuleNotFoundError(message, name=driver) from error
    except ArgumentError as error:
        message = hide_password(str(error), url.password)
    # Not in the except clause: the message of SQLAlchemy, its context, may show the URL.
    raise ValueError(message)
