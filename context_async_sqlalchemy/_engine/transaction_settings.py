"""Settings with which each transaction of an engine begins, such as the tenant."""

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cache, partial
from typing import Any, NoReturn, TypeAlias

from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine.border import sync_engine_of
from context_async_sqlalchemy._engine.checks import check_callable
from context_async_sqlalchemy._engine.commits import is_autocommit

TransactionSettings: TypeAlias = Callable[[], Mapping[str, str | int]]

_LISTENER = "_context_async_sqlalchemy_transaction_settings"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*", re.ASCII)
_AUTOCOMMIT = (
    "transaction_settings are those of a transaction, and with AUTOCOMMIT there is none: take a "
    "connect without them"
)


def check_transaction_settings(url: URL, settings: object, options: Mapping[str, Any]) -> None:
    """Refuse settings that would not hold, before there is an engine."""
    check_callable("transaction_settings", settings)
    if (name := url.get_dialect().name) != "postgresql":
        raise ValueError(
            f"transaction_settings need PostgreSQL: {name} has no setting that ends with its "
            "transaction, and the next user of the connection would have it"
        )
    for given in options, options.get("execution_options") or {}:
        if str(given.get("isolation_level")).upper() == "AUTOCOMMIT":
            raise ValueError(_AUTOCOMMIT)


def begin_with_settings(engine: Engine, settings: TransactionSettings) -> None:
    """Let each transaction of an engine, from now on, begin with what `settings` returns then.

    They are local to the transaction. With asyncpg, they are in the round trip of its BEGIN.
    """
    begin = partial(_begin, settings)
    setattr(engine, _LISTENER, begin)
    event.listen(engine, "begin", begin)
    event.listen(engine, "begin_twophase", _refuse_twophase)
    if engine.driver == "asyncpg":
        event.listen(engine, "do_connect", _choose_class)
        event.listen(engine, "checkin", _forget)


def begin_without_settings(engine: AsyncEngine) -> None:
    """Let the transactions of an engine that is nobody's begin without them."""
    sync_engine = sync_engine_of(engine)
    begin = vars(sync_engine).pop(_LISTENER, None)
    if begin is not None:
        event.remove(sync_engine, "begin", begin)
        event.remove(sync_engine, "begin_twophase", _refuse_twophase)


def has_transaction_settings(engine: AsyncEngine) -> bool:
    """Return whether each transaction of an engine begins with settings."""
    return _LISTENER in vars(sync_engine_of(engine))


def _begin(settings: TransactionSettings, connection: Connection) -> None:
    if is_autocommit(connection):
        raise InvalidRequestError(_AUTOCOMMIT)
    checked = _checked(settings())
    driver: Any = connection.connection.driver_connection
    if isinstance(driver, _BeginsWith) and driver.can_begin_with():
        driver.begin_with = _quoted_statement(checked)
    elif checked:
        # A test's: what is local to a savepoint outlives it.
        keep = getattr(connection.connection.dbapi_connection, "keep_settings", None)
        if keep is not None:
            keep(checked)
        connection.execute(*_bound_statement(checked))


def _refuse_twophase(*_: object) -> NoReturn:
    raise InvalidRequestError("transaction_settings are of no use with twophase=True")


def _checked(settings: object) -> dict[str, str]:
    """Return the settings as strings; no message shows a value, which may be secret."""
    if not isinstance(settings, Mapping):
        raise TypeError(
            "transaction_settings must return a mapping of names to values, not "
            f"{type(settings).__name__}"
        )
    for name, value in settings.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(f"transaction_settings: {name!r} is not the name of a setting")
        # Exactly these: what a subclass, such as an enumeration, means by its text is ambiguous.
        if type(value) is not str and type(value) is not int:
            raise TypeError(
                f"transaction_settings: {name!r} must be a str or an int, not "
                f"{type(value).__name__}"
            )
        if type(value) is str and ("\0" in value or not _is_unicode(value)):
            raise ValueError(f"transaction_settings: {name!r} has a character that cannot be sent")
    return {name: str(value) for name, value in settings.items()}


def _is_unicode(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _quoted_statement(settings: dict[str, str]) -> str:
    calls = (_call(_quoted(name), _quoted(value)) for name, value in settings.items())
    return f"SELECT {', '.join(calls)};" if settings else ""


def _bound_statement(settings: dict[str, str]) -> tuple[Any, dict[str, str]]:
    calls = [_call(f":name_{n}", f":value_{n}") for n in range(len(settings))]
    parameters: dict[str, str] = {}
    for number, (name, value) in enumerate(settings.items()):
        parameters |= {f"name_{number}": name, f"value_{number}": value}
    return text(f"SELECT {', '.join(calls)}"), parameters


def _call(name: str, value: str) -> str:
    return f"pg_catalog.set_config({name}, {value}, true)"


def _quoted(value: str) -> str:
    """Return a literal that means the same whatever `standard_conforming_strings` is."""
    literal = "'" + value.replace("'", "''") + "'"
    return "E" + literal.replace("\\", "\\\\") if "\\" in value else literal


class _BeginsWith:
    """A connection of asyncpg, which has no other way to put something into its BEGIN."""

    begin_with = ""  # taken by the next BEGIN

    get_settings: Callable[[], Any]
    is_in_transaction: Callable[[], bool]

    def can_begin_with(self) -> bool:
        # Quoting is safe in UTF-8. In SJIS, for one, the sign of the yen is sent as a backslash.
        # In a transaction, as in one that tests share, there is no BEGIN to come.
        return self.get_settings().client_encoding == "UTF8" and not self.is_in_transaction()

    def execute(self, query: str, *args: Any, **options: Any) -> Awaitable[str]:
        if self.begin_with and query.startswith("BEGIN"):
            query, self.begin_with = f"{query} {self.begin_with}", ""
        return super().execute(query, *args, **options)  # type: ignore[misc,no-any-return]


@cache
def _class_for(base: type) -> type:
    if issubclass(base, _BeginsWith):  # SQLAlchemy may keep the arguments of an earlier connection
        return base
    return type(base.__name__, (_BeginsWith, base), {"__module__": base.__module__})


def _choose_class(_: object, __: object, ___: object, arguments: dict[str, Any]) -> None:
    import asyncpg  # the engine's driver, so it is there

    arguments["connection_class"] = _class_for(
        arguments.get("connection_class", asyncpg.Connection)
    )


def _forget(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    # A transaction without a statement has sent no BEGIN.
    if isinstance(entry.driver_connection, _BeginsWith):
        entry.driver_connection.begin_with = ""
