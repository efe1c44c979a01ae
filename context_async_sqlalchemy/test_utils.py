"""For users' tests: one transaction for the test and the application, rolled back at the end."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.release import close_sessions
from context_async_sqlalchemy._testing.shared_transaction import share_connection
from context_async_sqlalchemy._unit.blocks import NO_SESSION, new_db_session_ctx
from context_async_sqlalchemy._unit.context import current_context, open_context
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import is_context_initiated, put_db_session_to_context
from context_async_sqlalchemy.exceptions import ContextAlreadyInitiatedError
from context_async_sqlalchemy.session import new_non_ctx_session


@asynccontextmanager
async def shared_transaction(
    connect: DBConnect[SessionT],
    timeout: float = 10.0,  # noqa: ASYNC109
) -> AsyncGenerator[SessionT]:
    """Run a test in a transaction that it shares with the application, rolled back at the end.

        async with shared_transaction(connect) as session:
            response = await client.post("/members/ann")
            assert await session.get(Member, "ann")

    Meanwhile every session of `connect`, in any context, is on one connection. The application
    opens, settles and closes its own contexts as usual: each of its transactions is a savepoint,
    which the end of the request releases or undoes. Transactions open at the same time take turns,
    each from its first statement to its end; one that is opened inside another, and awaited there,
    begins inside the other's savepoint.

    Args:
        connect: The database: PostgreSQL, or SQLite.
        timeout: How long a session waits for its turn, in seconds. Default 10.

    Yields:
        A session for the test. Its transactions are savepoints, too.

    Raises:
        InvalidRequestError: From a statement, if two sessions wait for each other, or one task uses
            them alternately, or it would end the transaction (COMMIT as text).
        NotImplementedError: If it is another database.
        RuntimeError: If a transaction is already open for `connect`; in the application, if it runs
            on another event loop; at the end, if the driver, or the database, has ended it.
    """
    await connect.session_maker()  # runs the handler, which may set the host
    async with connect._engines.pin() as opened, share_connection(opened.engine, timeout) as shared:
        session: SessionT = opened.session_maker()
        shared.turns.enclosing = session
        try:
            yield session
        finally:
            await close_sessions([session])


@asynccontextmanager
async def rollback_session(connection: DBConnect[SessionT]) -> AsyncGenerator[SessionT]:
    """Make a session for a test, rolled back at the end."""
    async with new_non_ctx_session(connection) as session:
        yield session


@asynccontextmanager
async def set_test_context(auto_close: bool = False) -> AsyncGenerator[None]:
    """Open a context in which a test calls the application.

    The middleware joins it, and leaves settling and closing to the test.

    Args:
        auto_close: Whether to commit all its sessions when the block ends, or roll them back when
            it raises, and to close them. Default False: nothing is committed, and only the sessions
            that `db_session` made are closed. The code that put in the others closes them, as
            `put_savepoint_session_in_ctx` does.

    Raises:
        ContextAlreadyInitiatedError: If a context is open.
    """
    if is_context_initiated():
        raise ContextAlreadyInitiatedError
    if auto_close:
        async with new_db_session_ctx():
            current_context().is_test = True
            yield NO_SESSION
        return
    context = open_context()
    context.is_test = True
    try:
        yield NO_SESSION
    finally:
        await context.close_made()
        await context.end(with_close=False)


@asynccontextmanager
async def put_savepoint_session_in_ctx(
    connection: DBConnect[SessionT], session: AsyncSession
) -> AsyncGenerator[SessionT]:
    """Put a session into the context that is on the same connection as a test's `session`.

    A commit by the application releases a savepoint. The test's session sees the work; rolling that
    session back undoes it.

        async with (
            rollback_session(connection) as session,
            set_test_context(),
            put_savepoint_session_in_ctx(connection, session),
        ):
            ...

    Args:
        connection: The database.
        session: The test's session, such as one from `rollback_session`.

    Raises:
        ContextNotInitiatedError: If there is no context.
    """
    session_maker = await connection.session_maker()
    async with session_maker(
        bind=await session.connection(), join_transaction_mode="create_savepoint"
    ) as savepoint_session:
        put_db_session_to_context(connection, savepoint_session)
        yield savepoint_session
