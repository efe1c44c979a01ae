"""BEGIN in the round trip of the first statement of a transaction, with asyncpg.

For a prepared statement, asyncpg sends Bind, Execute and Sync. Parse, Bind and Execute of BEGIN may
come before them: the server runs both, and skips the second if the first fails.
https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-PIPELINING
"""

import re
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import URL, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection

from context_async_sqlalchemy._engine.begin_rehearsed import can_fly, message
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import (
    CallsBeforeWrite,
    protocol_and_transport,
    replace_class,
)

T = TypeVar("T")

# As a transaction of asyncpg begins, be it with `transaction_settings`, and ends.
_BEGIN = re.compile(r"BEGIN[A-Z ]*;( SELECT pg_catalog\.set_config\(.*;)?", re.DOTALL)
_END = re.compile(r"(COMMIT|ROLLBACK);?")

# What else asyncpg can do, before which BEGIN is sent by itself: preparing has no Sync, and nobody
# would know of the transaction; COPY is a simple query, and not answered after a BEGIN that fails.
_OTHERS = (
    *("prepare", "bind", "execute", "bind_execute_many", "copy_in", "copy_out"),
    *("close_portal", "close_statement"),
)


def check_begin_with_first_statement(url: URL) -> None:
    """Refuse a driver that has no such way."""
    if (driver := url.get_dialect().driver) != "asyncpg":
        raise ValueError(
            f"begin_with_first_statement needs asyncpg, and this URL is for {driver}: take one of "
            "postgresql+asyncpg://, or leave the option out"
        )


def begin_with_first_statement(engine: Engine) -> None:
    """Let the connections that an engine opens from now on send BEGIN with the first statement."""
    event.listen(engine, "connect", _let_begin_wait)


def _let_begin_wait(connection: DBAPIConnection, _: object) -> None:
    protocol, transport = protocol_and_transport(connection.driver_connection)
    if transport is not None and (cls := _class_for(protocol.__class__)) is not None:
        replace_class(protocol, cls)
        protocol.wire = transport


@cache
def _class_for(base: type) -> type | None:
    """Return the class of a protocol whose BEGIN waits, or None if this asyncpg can have none."""
    cause: Exception | None = None  # or else it sends something else, or in another order
    try:
        others = {name: _after_begin(getattr(base, name)) for name in _OTHERS}
        cls = type(base.__name__, (_BeginWaits, CallsBeforeWrite, base), others)
        if can_fly(cls):
            return cls
    except Exception as error:
        cause = error
    logger.warning(
        "begin_with_first_statement does not work with this version of asyncpg: BEGIN is sent by "
        "itself",
        exc_info=cause,
    )
    return None


class _BeginWaits:
    """A protocol of asyncpg: all that its connection sends goes through it."""

    begin = ""  # waits, to be sent with what comes next, or before it
    in_doubt = ""  # was sent, and what came of it is not known

    wire: Any  # its transport, which asyncpg keeps to itself

    def before_write(self) -> None:
        # What comes next is checked, and encoded: nothing is left that could fail.
        if self.begin:
            begin, self.begin = self.begin, ""
            write_with_next(self.wire, _messages(begin))

    def is_in_transaction(self) -> bool:
        return bool(self.begin or self.in_doubt) or self._has_begun()

    def _has_begun(self) -> bool:
        return super().is_in_transaction()  # type: ignore[misc,no-any-return]

    async def query(self, query: str, *rest: Any, **options: Any) -> str:
        end = _END.fullmatch(query)
        if end and self.begin:
            self.begin = ""
            return end[1]  # of nothing
        if _BEGIN.fullmatch(query) and not self.is_in_transaction():
            self.begin = query
            return "BEGIN"
        if not end:
            await self.begin_now()
        answer: str = await super().query(query, *rest, **options)  # type: ignore[misc]
        if end:
            self.in_doubt = ""
        return answer

    async def bind_execute(
        self, state: Any, args: Any, portal_name: str, limit: int, *rest: Any, **options: Any
    ) -> Any:
        # Where not all rows are fetched at once, the end of BEGIN would be taken for that of the
        # statement; and BEGIN takes the place of a statement without a name.
        if self.in_doubt or portal_name or limit or not state.name:
            await self.begin_now()
        executing = super().bind_execute(state, args, portal_name, limit, *rest, **options)  # type: ignore[misc]
        return await (self._watch(self.begin, executing) if self.begin else executing)

    async def begin_now(self) -> None:
        """Send a BEGIN that waits by itself."""
        if self.in_doubt:
            await super().close_portal("", None)  # type: ignore[misc]  # of none: it ends with Sync
            begin, self.in_doubt = self.in_doubt, ""
            self.begin = "" if self._has_begun() else begin
        if self.begin:
            begin, self.begin = self.begin, ""
            await self._watch(begin, super().query(begin, None))  # type: ignore[misc]

    async def _watch(self, begin: str, sending: Awaitable[T]) -> T:
        try:
            return await sending
        except BaseException as error:
            if self.begin:
                pass  # it waits still: the statement was refused before
            elif not isinstance(error, _answers()):
                self.in_doubt = begin
            elif not self._has_begun():
                self.begin = begin  # without it, the next statement would be stored at once
            raise


def _answers() -> type[Exception]:
    from asyncpg import PostgresError  # the engine's driver, so it is there

    error: type[Exception] = PostgresError
    return error


def _after_begin(operation: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def begin_and_operate(protocol: _BeginWaits, *args: Any, **options: Any) -> Any:
        await protocol.begin_now()
        return await operation(protocol, *args, **options)

    return begin_and_operate


def _messages(begin: str) -> bytes:
    statement, _, settings = begin.partition(";")
    messages = _run_again(statement)
    if settings:
        # Its row would be one of the statement. OFFSET skips it, and it is computed all the same.
        messages += _run(settings.strip(" ;") + " OFFSET 1")
    return messages


def _run(statement: str) -> bytes:
    """Return Parse, Bind and Execute of a statement without a name, parameters or rows."""
    parse = b"\0" + statement.encode() + b"\0\0\0"
    return message(b"P", parse) + message(b"B", bytes(8)) + message(b"E", bytes(5))


_run_again = cache(_run)  # there are few ways to begin


def write_with_next(transport: Any, data: bytes) -> None:
    """Let a transport write `data` together with what it writes next."""

    def write(following: bytes) -> None:
        del transport.write
        transport.write(data + bytes(following))

    # Two pieces would wake the server twice. uvloop collects what is written until the next turn of
    # its loop, and its transports cannot be changed.
    if hasattr(transport, "__dict__"):
        transport.write = write
    else:
        transport.write(data)
