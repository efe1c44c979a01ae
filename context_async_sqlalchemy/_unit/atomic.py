"""A block in a transaction of its own, or in a savepoint of the one that is open."""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, TypeAlias, get_args

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from context_async_sqlalchemy._engine.border import real_session
from context_async_sqlalchemy._engine.discard import invalidate
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.release import connections_of
from context_async_sqlalchemy._engine.release_in_turn import rollback_in_turn
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._engine.turns import hold
from context_async_sqlalchemy._unit.sessions import db_session
from context_async_sqlalchemy._unit.settle import commit_session
from context_async_sqlalchemy.connect import DBConnect

CurrentTransaction: TypeAlias = Literal["commit", "rollback", "append", "raise", "savepoint"]


def atomic_db_session(
    connect: DBConnect[SessionT], current_transaction: CurrentTransaction = "commit"
) -> AbstractAsyncContextManager[SessionT]:
    """Run a block in a transaction of the context's session, committed at its end.

    An exception rolls it back.

        async with atomic_db_session(connect) as session:
            session.add(User(name="Ann"))

    Args:
        connect: The database.
        current_transaction: What to do with a transaction that is open already: "commit" (the
            default) and "rollback" end it before the block; "append" continues it, and the end of
            the block commits or rolls back both; "raise" refuses it; "savepoint" keeps it open, and
            an exception undoes the block only. If none is open, the block begins one in any case.

    Raises:
        CommitOutcomeUnknownError: If the connection was lost during COMMIT.
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
        InvalidRequestError: If a transaction is open and `current_transaction` is "raise".
        ValueError: If `current_transaction` is none of these.
    """
    if current_transaction not in get_args(CurrentTransaction):
        names = ", ".join(repr(name) for name in get_args(CurrentTransaction))
        raise ValueError(f"current_transaction must be one of {names}, not {current_transaction!r}")
    return _atomic(connect, current_transaction)


@asynccontextmanager
async def _atomic(
    connect: DBConnect[SessionT], current_transaction: CurrentTransaction
) -> AsyncGenerator[SessionT]:
    given = await db_session(connect, read_only=False)
    session = real_session(given)
    if session.in_transaction():
        if current_transaction == "savepoint":
            async with _savepoint(session):
                yield given
            return
        if current_transaction == "raise":
            raise InvalidRequestError(
                "A transaction is open already on the database session of this context: commit it "
                'first, or choose "commit", "rollback", "append" or "savepoint" as '
                "current_transaction."
            )
        if current_transaction == "commit":
            await commit_session(session)
        elif current_transaction == "rollback":
            await session.rollback()
    if not session.in_transaction():
        await session.begin()
    try:
        yield given
        await commit_session(session)
    except BaseException:
        await rollback_in_turn(session)
        raise


@asynccontextmanager
async def _savepoint(session: AsyncSession) -> AsyncGenerator[None]:
    savepoint = await session.begin_nested()
    with hold(session):
        try:
            yield
            # After a flush that failed, SQLAlchemy's own block would end the savepoint silently.
            if _is_open(session, savepoint):
                await savepoint.commit()
        except BaseException:
            if _is_open(session, savepoint):
                await run_to_completion(_rollback(session, savepoint))
            elif session.in_transaction():
                await rollback_in_turn(session)  # the block ended the savepoint, and went on
            raise


def _is_open(session: AsyncSession, savepoint: AsyncSessionTransaction) -> bool:
    # The block may have ended it, or the transaction around it.
    transaction = session.sync_session.get_nested_transaction()
    while transaction is not None and transaction is not savepoint.sync_transaction:
        transaction = transaction.parent
    return transaction is savepoint.sync_transaction


async def _rollback(session: AsyncSession, savepoint: AsyncSessionTransaction) -> None:
    connections = connections_of(session)
    try:
        await savepoint.rollback()
    except Exception:
        logger.exception("A savepoint failed to roll back; its connection is discarded")
        # Otherwise a commit of the transaction around it would store what was to be undone.
        for connection in connections:
            await invalidate(connection)
