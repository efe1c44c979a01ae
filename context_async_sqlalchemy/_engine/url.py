"""A database URL: read, given an async driver and perhaps another host."""

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, unquote

from sqlalchemy import URL, make_url
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

_ASYNC_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}

# Several hosts, as libpq takes them: SQLAlchemy would take the second one for a part of a port.
_SEVERAL_HOSTS = re.compile(r"(?s)([\w+]+://(?:[^:/]*(?::[^@]*)?@)?)([^/?@,]*,[^/?@]*)([/?].*)?")

# Of libpq's, those that it refuses without a value. To ignore `sslmode=` would turn TLS off.
_NEVER_EMPTY = {"sslmode", "ssl", "sslnegotiation", "channel_binding", "gssencmode"} | {
    "target_session_attrs",
    "connect_timeout",
}
_UNREADABLE = (
    "the database URL cannot be read: it should be like "
    "'postgresql://user:password@host:5432/database'"
)


def parse_url(url: str | URL, password: str | None = None) -> URL:
    """Read a database URL, and choose the async driver where it names none.

    A password in its query is moved to where SQLAlchemy hides it; `password` wins over both. What
    cannot be used is a `TypeError` or a `ValueError`, whose message shows no password.
    """
    parsed = _hide_password(_read_host(_choose_driver(_read_url(url))))
    if issubclass(parsed.get_dialect(), PGDialect):
        _check_values(url)
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
    if "@" in host[1:]:  # the first character may be that of an abstract socket
        raise ValueError("a host has no user and no password: write 'host' or 'host:port'")
    if url.get_backend_name() == "sqlite":
        raise ValueError(f"an SQLite database is a file, and has no host {host!r}")
    url = url.difference_update_query(["host", "port"])
    name, port = _split_host(host)
    return _read_host(url.set(host=name, port=port or url.port))


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
    hosts = ""
    if (several := _SEVERAL_HOSTS.fullmatch(url)) is not None:
        before, hosts, after = several.groups("")
    try:
        parsed = make_url(before + after).set(host=hosts) if hosts else make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None:
        # Not in the except clause, whose error would be the context of this one: SQLAlchemy 2.0
        # shows the whole string, int() what is in the place of the port.
        raise ValueError(_UNREADABLE)
    # With an @ in the password, SQLAlchemy takes the rest of it for the host, which it shows.
    place, _, query = url.partition("@")[2].partition("?")
    keys = (item.partition("=")[0] for item in query.split("&"))
    if parsed.host and any("@" in part for part in (place, *keys)):
        raise ValueError(
            "the database URL has more than one @: write %40 for one in the user name or the "
            "password, or give the password apart"
        )
    return parsed


def _check_values(url: str | URL) -> None:
    if isinstance(url, URL):
        pairs = [(key, value) for key, values in url.normalized_query.items() for value in values]
    else:  # SQLAlchemy leaves out what has no value
        pairs = parse_qsl(url.rpartition("?")[2], keep_blank_values=True)
    for key, value in pairs:
        if key in _NEVER_EMPTY and not value:
            raise ValueError(f"{key} has no value in the URL's query: give it one, or leave it out")


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


def _read_host(url: URL) -> URL:
    backend, host = url.get_backend_name(), url.host or ""
    if backend == "sqlite" and (host or url.username or url.password or url.port):
        raise ValueError(
            "an SQLite database is a file, and has neither a host nor a user: "
            "'sqlite:///name.db', or 'sqlite:////directory/name.db' with a path from the root"
        )
    is_socket = host.lower().startswith("%2f")  # its directory, as libpq takes it
    if issubclass(url.get_dialect(), PGDialect):
        return _set_hosts(url, host) if "," in host or is_socket else url
    if backend in ("mysql", "mariadb") and ("," in host or is_socket):
        raise ValueError(
            f"{url.get_dialect().driver} takes one host, and a socket as '?unix_socket=/path'"
        )
    return url


def _set_hosts(url: URL, hosts: str) -> URL:
    # SQLAlchemy reads them from the query, and a port for each.
    names, ports = zip(*map(_split_host, hosts.split(",")), strict=True)
    if not all(names) or any(":" in name and "::" not in name for name in names):
        raise ValueError(_UNREADABLE)
    if any(ports) and not all(ports):
        raise ValueError(
            "of several hosts, each needs its port, or none of them has one: "
            "'postgresql://user@host1:5432,host2:5432/database'"
        )
    several = {
        "host": ",".join(map(unquote, names)),
        "port": ",".join(str(port or url.port or 5432) for port in ports),
    }
    return url.set(host="").update_query_dict(several)


def _split_host(host: str) -> tuple[str, int | None]:
    name, _, port = host.rpartition(":")
    is_bare_ipv6 = ":" in name and not name.endswith("]")
    if not name or is_bare_ipv6 or not port.isdecimal():
        return host.strip("[]"), None
    return name.strip("[]"), int(port)


def _hide_password(url: URL) -> URL:
    # libpq also reads user and password from the query. SQLAlchemy hides a password only before the
    # host.
    if url.get_backend_name() == "sqlite":
        return url
    user, password, passwd = (_last(url.query.get(k)) for k in ("user", "password", "passwd"))
    url = url.difference_update_query(["user", "password", "passwd"])
    return url.set(username=user or url.username, password=password or passwd or url.password)


def _last(value: str | Sequence[str] | None) -> str | None:
    return value if value is None or isinstance(value, str) else value[-1]
