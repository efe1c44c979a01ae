"""No connection but that of a test's transaction: what would use another one is refused."""

from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar

from sqlalchemy import Engine, Pool, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from context_async_sqlalchemy._testing.lent_connection import LentConnection


@contextmanager
def refuse_other_connections() -> Generator[None]:
    """Refuse, for a block, each connection of any engine that is not a part of a test's."""
    event.listen(Engine, "do_connect", _refuse)
    event.listen(Pool, "checkout", _check)
    try:
        yield
    finally:
        event.remove(Engine, "do_connect", _refuse)
        event.remove(Pool, "checkout", _check)


@asynccontextmanager
async def connection_of_test(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """Open the connection that has the transaction of a test."""
    async with AsyncExitStack() as stack:
        token = _is_opening.set(True)
        try:
            connection = await stack.enter_async_context(engine.connect())
        finally:
            _is_opening.reset(token)
        yield connection


def _check(connection: DBAPIConnection, *_: object) -> None:
    if not isinstance(connection, LentConnection):  # but one that a pool had already
        _refuse()


def _refuse(*_: object) -> None:
    if not _is_opening.get():
        raise InvalidRequestError(_REFUSED)


_is_opening: ContextVar[bool] = ContextVar("is_opening", default=False)

_REFUSED = (
    "A connection was asked for outside of a test's transaction, where a commit would stay, and "
    "the fixture 'no_real_database' refuses that. Request 'client', 'shared_session', "
    "'shared_client' or 'db_context' in the test, and use the connect of the fixture 'db_connect'. "
    "For tests of real transactions, define a fixture 'no_real_database' that does nothing in "
    "their module."
)
