"""Mocks of what a context, a connect and an engine are made of."""

from __future__ import annotations

from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker


def session_mock(in_transaction: bool = False) -> Any:
    session = MagicMock(spec=AsyncSession)
    session.in_transaction.return_value = in_transaction
    return session


def connect_mock(key: str = "key") -> Any:
    return Mock(spec=["context_key"], context_key=key)


def engine_mock() -> Any:
    return Mock(spec=["dispose"], dispose=AsyncMock())


class Creators:
    """Counts the engines it makes, all of them mocks."""

    def __init__(self) -> None:
        self.engines: dict[str, list[Any]] = {}

    def engine(self, host: str) -> AsyncEngine:
        engine: AsyncEngine = engine_mock()
        self.engines.setdefault(host, []).append(engine)
        return engine

    def session_maker(self, engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return Mock(return_value=MagicMock(spec=AsyncSession, engine=engine))
