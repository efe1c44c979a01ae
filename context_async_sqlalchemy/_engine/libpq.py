"""Translates the query of a URL made for libpq to arguments of asyncpg."""

import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import URL

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

# asyncpg takes these in a DSN only, with the meaning that they have to libpq.
_TLS_KEYS = {"sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl"} | {
    f"ssl_{end}_protocol_version" for end in ("min", "max")
}

# Sent to the server as they are, as libpq does.
_SERVER_SETTINGS = {"application_name", "options"}

_READ_BY_SQLALCHEMY = {"host", "port", "plugin", "prepared_statement_cache_size"}

# What asyncpg does anyway; and channel_binding=require, which it cannot do, but which hosts put in
# all their URLs.
_DROPPED = {
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer"),
}


def translate_libpq_url(url: URL) -> tuple[URL, dict[str, Any]]:
    """Move what asyncpg cannot read in a URL's query into arguments of `asyncpg.connect()`.

    `channel_binding` is dropped, even `require`: see `lets_impostors_in`. What asyncpg does not
    support, and what is said twice with different values, is a `ValueError`.
    """
    kept: dict[str, str | tuple[str, ...]] = {}
    arguments: dict[str, Any] = {}
    settings: dict[str, str] = {}
    tls: dict[str, str] = {}
    for key, values in url.query.items():
        if key in _READ_BY_SQLALCHEMY:
            kept[key] = values
            continue
        value = _one_value(key, values)
        if not value:
            continue  # to libpq, an empty value is the default
        if key in _TLS_KEYS or key == "ssl":  # SQLAlchemy's documentation says ssl=
            name = "sslmode" if key == "ssl" else key
            tls[name] = _one_value("sslmode and ssl", (tls.get(name, value), value))
        elif key in _SERVER_SETTINGS:
            settings[key] = value
        elif key in _ARGUMENTS:
            name, convert = _ARGUMENTS[key]
            arguments[name] = _convert(key, value, convert)
        elif value not in _DROPPED.get(key, ()):
            said = f"{key}={value}" if key in _DROPPED else key
            raise ValueError(f"asyncpg does not support {said!r}, which is in the URL's query")
    if settings:
        arguments["server_settings"] = settings
    arguments |= _tls_arguments(tls)
    # asyncpg 0.30 takes it with sslmode=prefer, and would do without TLS.
    is_weak = "ssl" not in arguments and tls.get("sslmode", "prefer") in _SSL_MODES[:3]
    if is_weak and arguments.get("direct_tls"):
        raise ValueError("sslnegotiation=direct needs sslmode=require, or a stronger one")
    return url.set(query=kept), arguments


def lets_impostors_in(url: URL, connect_args: Mapping[str, Any]) -> bool:
    """Return whether a URL relies on `channel_binding=require`, and does not verify the server."""
    query = url.normalized_query
    if "require" not in query.get("channel_binding", ()):
        return False
    if "ssl" in connect_args:
        given = connect_args["ssl"]
        return not (given in (True, "verify-full") or getattr(given, "check_hostname", False))
    modes = (*query.get("sslmode", ()), *query.get("ssl", ())) or (os.environ.get("PGSSLMODE"),)
    return "verify-full" not in modes and "system" not in query.get("sslrootcert", ())


def _one_value(key: str, values: str | Sequence[str]) -> str:
    # libpq takes the last one, which may be the weaker one.
    value, *others = [values] if isinstance(values, str) else set(values)
    if others:
        raise ValueError(f"the URL's query has different values for {key}: leave one of them")
    return value


def _tls_arguments(tls: dict[str, str]) -> dict[str, Any]:
    mode = tls.get("sslmode")
    if mode is not None and mode not in _SSL_MODES:
        raise ValueError(f"sslmode must be one of {', '.join(_SSL_MODES)}, not {mode!r}")
    if tls.get("sslrootcert") == "system":
        return {"ssl": _system_context(tls)}
    return {"dsn": f"postgresql://?{urlencode(tls)}"} if tls else {}


def _system_context(tls: dict[str, str]) -> ssl.SSLContext:
    # To asyncpg "system" is the name of a file. To libpq verify-full is then the default, and the
    # only mode: with another one, any certificate that the system trusts would do.
    if tls.get("sslmode", "verify-full") != "verify-full":
        raise ValueError("sslrootcert=system needs sslmode=verify-full")
    if others := tls.keys() - {"sslmode", "sslrootcert", "sslcert", "sslkey"}:
        raise ValueError(f"{', '.join(sorted(others))}: not supported with sslrootcert=system")
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])  # which servers ask for with sslnegotiation=direct
    if "sslcert" in tls:
        context.load_cert_chain(tls["sslcert"], tls.get("sslkey"))
    return context


def _convert(key: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(value)
    except (KeyError, ValueError):
        raise ValueError(f"{value!r} is no value for {key!r}, in the URL's query") from None


def _connect_timeout(value: str) -> float | None:
    seconds = float(value)
    return seconds if seconds > 0 else None  # libpq: no limit


_ARGUMENTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "connect_timeout": ("timeout", _connect_timeout),
    "sslnegotiation": ("direct_tls", {"postgres": False, "direct": True}.__getitem__),
    "target_session_attrs": ("target_session_attrs", str),
    "passfile": ("passfile", str),
    "krbsrvname": ("krbsrvname", str),
    "gsslib": ("gsslib", str),
    # asyncpg's own arguments, which SQLAlchemy passes on as strings.
    "timeout": ("timeout", float),
    "command_timeout": ("command_timeout", float),
    "statement_cache_size": ("statement_cache_size", int),
    "max_cached_statement_lifetime": ("max_cached_statement_lifetime", int),
    "max_cacheable_statement_size": ("max_cacheable_statement_size", int),
}
