"""The border: for a mock of a user's test, something of SQLAlchemy's that stands in for it.

Who is given an engine, a session or a connect asks here, and knows real ones only from then on.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import Session

from context_async_sqlalchemy._engine.log import logger


def sync_engine_of(engine: AsyncEngine) -> Engine:
    """Return the engine inside `engine`; for a mock, one that never opens anything."""
    sync_engine = getattr(engine, "sync_engine", None)
    if isinstance(sync_engine, Engine):
        return sync_engine
    return create_engine("sqlite://", poolclass=NullPool)


def password_of(engine: AsyncEngine | None) -> str | None:
    """Return the password with which an engine connects, if it has one that can be shown."""
    password = getattr(getattr(engine, "url", None), "password", None)
    return password if isinstance(password, str) else None


def is_mocked(connect: Any) -> bool:
    """Return whether something that a test has put there makes the sessions of a connect."""
    own = vars(connect)
    # A mock has no engines; a method that was replaced is among what is the connect's own.
    return "_engines" not in own or "create_session" in own or "session_maker" in own


def threshold_of(connect: object) -> float | None:
    """Return the `leak_detection_threshold` of a connect; a mock of one has none."""
    threshold = getattr(connect, "leak_detection_threshold", None)
    return threshold if isinstance(threshold, int | float) else None


def real_session(session: AsyncSession) -> AsyncSession:
    """Return `session`; for a mock, a session that passes on to it what would end a transaction."""
    # By its type: an autospec says of itself that it is a Session.
    if issubclass(type(getattr(session, "sync_session", None)), Session):
        return session
    return _StandIn(session)


def given_session(session: AsyncSession) -> AsyncSession:
    """Return the session for which `real_session` returned this one: what the user has."""
    return session.mock if isinstance(session, _StandIn) else session


def settle_once(session: AsyncSession) -> None:
    """Let the stand-in for a mock be settled once.

    A mock may say at any time that it is in a transaction: one that was rolled back with a 404
    would be committed when the body ends. A fake that tells the truth is settled again.
    """
    if isinstance(session, _StandIn):
        session.settles_once = True


class _StandIn(AsyncSession):
    def __init__(self, mock: Any) -> None:
        super().__init__()
        self.mock = mock
        self.settles_once = self.is_settled = False

    def __repr__(self) -> str:
        return repr(self.mock)

    def in_transaction(self) -> bool:
        answer = self.mock.in_transaction()
        if inspect.iscoroutine(answer):  # from a mock with nothing but async methods
            answer.close()
        return bool(answer) and not self.is_settled

    def begin(self) -> AsyncSessionTransaction:
        return _StandInTransaction(self, self.mock.begin())

    def begin_nested(self) -> AsyncSessionTransaction:
        return _StandInTransaction(self, self.mock.begin_nested(), nested=True)

    async def flush(self, objects: Sequence[Any] | None = None) -> None:
        await self.mock.flush()

    async def commit(self) -> None:
        await self.mock.commit()
        self.is_settled = self.settles_once and self.in_transaction()

    async def rollback(self) -> None:
        await self.mock.rollback()
        self.is_settled = self.settles_once and self.in_transaction()

    async def close(self) -> None:
        await self.mock.close()

    async def invalidate(self) -> None:
        try:
            await self.mock.invalidate()
        except Exception:
            logger.exception("The connection of a database session could not be discarded")


class _StandInTransaction(AsyncSessionTransaction):
    """A transaction of a mock, whose `begin` returns nothing to wait for if it has a spec."""

    def __init__(self, session: AsyncSession, mock: Any, nested: bool = False) -> None:
        super().__init__(session, nested)
        self._mock = mock

    async def start(self, is_ctxmanager: bool = False) -> AsyncSessionTransaction:
        if inspect.isawaitable(self._mock):
            self._mock = await self._mock
        return self

    async def commit(self) -> None:
        await self._mock.commit()

    async def rollback(self) -> None:
        await self._mock.rollback()
