"""A database URL: read, given an async driver and perhaps another host."""

from collections.abc import Sequence

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

_ASYNC_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}


def parse_url(url: str | URL, password: str | None = None) -> URL:
    """Read a database URL, and choose the async driver where it names none.

    A password in its query is moved to where SQLAlchemy hides it; `password` wins over both. What
    cannot be used is a `TypeError` or a `ValueError`, whose message shows no password.
    """
    parsed = _hide_password(_choose_driver(_read_url(url)))
    if password is not None and not isinstance(password, str):
        raise TypeError(f"password must be a str, not {type(password).__name__}")
    if password:
        parsed = parsed.set(password=password)
    if parsed.password and not parsed.username:
        raise ValueError("there is a password, and no user name in the database URL")
    return parsed


def set_host(url: URL, host: str | None) -> URL:
    """Put another host, or "host:port", into a URL; None leaves it."""
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
