"""An engine from a database URL."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from sqlalchemy import URL, AsyncAdaptedQueuePool, Connection, Pool, QueuePool, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, IsolationLevel
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy.libpq import translate_libpq_url
from context_async_sqlalchemy.ping import ping_idle_connections

_ASYNC_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}

# The extra of this package that installs a driver.
_EXTRAS = {"asyncpg": "postgresql", "psycopg": "psycopg", "aiosqlite": "sqlite", "asyncmy": "mysql"}

# SQLAlchemy takes any number. -1 means "no limit" to max_overflow, and "never" to pool_recycle.
_MINIMUM = {"pool_size": 0, "max_overflow": -1, "pool_timeout": 0, "pool_recycle": -1}


class EngineOptions(TypedDict, total=False):
    """The options of `sqlalchemy.create_engine()` that `create_engine` takes.

    See https://docs.sqlalchemy.org/en/20/core/engines.html#sqlalchemy.create_engine.params
    """

    async_creator: Callable[[], Awaitable[Any]]
    connect_args: dict[str, Any]
    echo: bool | Literal["debug"]
    echo_pool: bool | Literal["debug"]
    enable_from_linting: bool
    execution_options: Mapping[str, Any]
    future: Literal[True]
    hide_parameters: bool
    insertmanyvalues_page_size: int
    isolation_level: IsolationLevel | None
    json_deserializer: Callable[[str], Any]
    json_serializer: Callable[[Any], str]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    max_overflow: int
    native_inet_types: bool
    plugins: Sequence[str]
    pool_logging_name: str
    pool_pre_ping: bool
    pool_recycle: int
    pool_reset_on_return: Literal["rollback", "commit"] | None
    pool_size: int
    pool_timeout: float
    pool_use_lifo: bool
    poolclass: type[Pool]
    query_cache_size: int
    skip_autocommit_rollback: bool
    use_insertmanyvalues: bool


def parse_url(url: str | URL, password: str | None = None) -> URL:
    """Read a database URL and choose the async driver, where it names none.

    Args:
        url: A string, or a `sqlalchemy.URL`. Without a driver, `postgresql` (or `postgres`) gets
            asyncpg, `sqlite` aiosqlite, `mysql` and `mariadb` asyncmy. A password in its query is
            moved to where SQLAlchemy hides it.
        password: The password, not percent-encoded; wins over the one in the URL. Default None, or
            empty: use the one in the URL.

    Returns:
        The URL for `create_engine`.

    Raises:
        TypeError: If `url` or `password` is of another type.
        ValueError: If the URL cannot be read, its driver is not async or not known, or there is a
            password without a user name. No message shows a password.
    """
    parsed = _hide_password(_choose_driver(_read_url(url)))
    if password is not None and not isinstance(password, str):
        raise TypeError(f"password must be a str, not {type(password).__name__}")
    if password:
        parsed = parsed.set(password=password)
    if parsed.password and not parsed.username:
        raise ValueError("there is a password, and no user name in the database URL")
    return parsed


def create_engine(
    url: URL, *, ping_after_idle: float = 1.0, **options: Unpack[EngineOptions]
) -> AsyncEngine:
    """Make an engine that behaves as its database's documentation says; opens no connection.

    PostgreSQL with asyncpg: the query may have the parameters of libpq that are in the URLs of
    hosted databases: `sslmode`, `sslrootcert`, `options`, `application_name`, `connect_timeout`,
    and so on. `channel_binding` is dropped, even `require`: asyncpg has none. Only
    `sslmode=verify-full` verifies the server then.

    SQLite: BEGIN is sent before the first statement, so that savepoints, reads and DDL belong to
    the transaction; foreign keys are enforced; a writer waits up to 5 seconds for another one. A
    transaction that reads before it writes cannot wait, unless it begins with the lock:
    `connect_args={"isolation_level": "IMMEDIATE"}`. A database in memory has one connection: one
    session at a time uses it, the others wait, and `pool_size`, `max_overflow` and `pool_recycle`
    do not apply.

    Args:
        url: As `parse_url` returns it.
        ping_after_idle: With `pool_pre_ping=True`, ping a connection only if it was idle for longer
            than this, in seconds. Default 1.
        **options: Of `sqlalchemy.create_engine()`, with its defaults; see `EngineOptions`.
            `connect_args`, and each of its `server_settings`, win over the URL.

    Raises:
        ModuleNotFoundError: If the driver is not installed.
        TypeError: If there is no such option.
        ValueError: If an option is invalid, or asyncpg does not support what is in the URL.
    """
    _check(ping_after_idle, options)
    has_ping = options.pop("pool_pre_ping", False)
    dialect = url.get_dialect()
    if dialect.driver == "asyncpg":
        url, arguments = translate_libpq_url(url)
        options["connect_args"] = _merge(arguments, options.get("connect_args", {}))
    if dialect.name == "sqlite":
        engine = _create_sqlite_engine(url, options)
    else:
        engine = _create_async_engine(url, **options)
    if has_ping:
        ping_idle_connections(engine.sync_engine, ping_after_idle)
    return engine


def set_host(url: URL, host: str | None) -> URL:
    """Put another host, or "host:port", into a URL; None leaves it.

    Raises:
        ValueError: If the database has no host.
    """
    if host is None or host == url.host:
        return url
    if url.get_backend_name() == "sqlite":
        raise ValueError(f"an SQLite database is a file, and has no host {host!r}")
    url = url.difference_update_query(["host", "port"])
    name, _, port = host.rpartition(":")
    is_bare_ipv6 = ":" in name and not name.endswith("]")
    if not name or is_bare_ipv6 or not port.isdecimal():
        return url.set(host=host.strip("[]"))
    return url.set(host=name.strip("[]"), port=int(port))


def is_in_memory(url: URL) -> bool:
    """Return whether it is an SQLite database that ends with its last connection."""
    if url.get_backend_name() != "sqlite":
        return False
    in_query = "memory" in url.query.get("mode", ())
    return in_query or not url.database or ":memory:" in url.database


def check_idle_options(
    url: URL, idle_timeout: float, min_idle: int, poolclass: type[Pool] | None
) -> None:
    """Check the options of `close_idle_connections`.

    Raises:
        ValueError: If one is invalid, or of no use for this database and pool.
    """
    if idle_timeout <= 0:
        raise ValueError(f"idle_timeout must be more than 0 seconds, not {idle_timeout}")
    if min_idle < 0:
        raise ValueError(f"min_idle must be at least 0, not {min_idle}")
    if poolclass is not None and not issubclass(poolclass, QueuePool):
        raise ValueError(f"idle_timeout is of no use with {poolclass.__name__}")
    if is_in_memory(url):
        raise ValueError("a database in memory ends with its connection: it takes no idle_timeout")


def _read_url(url: str | URL) -> URL:
    if isinstance(url, URL):
        return url
    if not isinstance(url, str):
        raise TypeError(f"url must be a str or a sqlalchemy.URL, not {type(url).__name__}")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None:
        # Not in the except clause, whose error would be the context of this one: SQLAlchemy 2.0
        # shows the whole string, int() what is in the place of the port.
        raise ValueError(
            "the database URL cannot be read: it should be like "
            "'postgresql://user:password@host:5432/database'"
        )
    # With an @ in the password, SQLAlchemy takes the rest of it for the host, which it shows.
    place, _, query = url.partition("@")[2].partition("?")
    keys = (item.partition("=")[0] for item in query.split("&"))
    if parsed.host and any("@" in part for part in (place, *keys)):
        raise ValueError(
            "the database URL has more than one @: write %40 for one in the user name or the "
            "password, or give the password apart"
        )
    return parsed


def _choose_driver(url: URL) -> URL:
    backend, plus, driver = url.drivername.partition("+")
    backend = "postgresql" if backend == "postgres" else backend
    url = url.set(
        drivername=backend + plus + driver if plus else _ASYNC_DRIVERS.get(backend, backend)
    )
    try:
        dialect = url.get_dialect()
    except NoSuchModuleError:
        raise ValueError(f"SQLAlchemy knows no database driver {url.drivername!r}") from None
    # psycopg and oracledb have one name for both dialects: the sync one knows the async one.
    if not dialect.get_async_dialect_cls(url).is_async:
        proposal = repr(_ASYNC_DRIVERS[backend]) if backend in _ASYNC_DRIVERS else "an async one"
        raise ValueError(f"the driver {dialect.driver!r} is not async: use {proposal}")
    return url


def _hide_password(url: URL) -> URL:
    # libpq also reads user and password from the query. SQLAlchemy hides a password only before the
    # host.
    if url.get_backend_name() == "sqlite":
        return url
    user, password = (_last(url.query.get(key)) for key in ("user", "password"))
    url = url.difference_update_query(["user", "password"])
    return url.set(username=user or url.username, password=password or url.password)


def _last(value: str | Sequence[str] | None) -> str | None:
    return value if value is None or isinstance(value, str) else value[-1]


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
        raise ModuleNotFoundError(_how_to_install(driver), name=driver) from error


def _how_to_install(driver: str) -> str:
    extra = _EXTRAS.get(driver)
    package = '"psycopg[binary]"' if driver == "psycopg" else driver
    message = f"The driver {driver} is not installed: 'pip install {package}'"
    if extra is None:
        return message
    return f'{message}, or install context-async-sqlalchemy with its extra "{extra}"'


def _create_sqlite_engine(url: URL, options: EngineOptions) -> AsyncEngine:
    if "autocommit" in options.get("connect_args", {}):
        raise ValueError("autocommit: say isolation_level='AUTOCOMMIT' instead of this connect_arg")
    if is_in_memory(url) and "poolclass" not in options:
        # SQLAlchemy would give one connection, and its transaction, to all sessions at a time: the
        # rollback of one would undo what another has written.
        options["poolclass"] = AsyncAdaptedQueuePool
        options["pool_size"], options["max_overflow"], options["pool_recycle"] = 1, 0, -1
    engine = _create_async_engine(url, **options)
    event.listen(engine.sync_engine, "connect", _enforce_foreign_keys)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _enforce_foreign_keys(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    # The driver would begin only before INSERT, UPDATE or DELETE: neither a savepoint nor DDL
    # before it would be part of the transaction. SQLAlchemy's page also tells to set this attribute
    # to None, but that means AUTOCOMMIT to SQLAlchemy; having begun already, the driver does not.
    driver: Any = connection.connection.dbapi_connection
    if driver.isolation_level is not None:
        connection.exec_driver_sql(f"BEGIN {driver.isolation_level}")
