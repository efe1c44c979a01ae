"""A session for a package that commits by itself."""

from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncSession


class CommitsLater:
    """A session whose commit only flushes: the end of the request settles."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def commit(self) -> None:
        await self._session.flush()


def commits_later(session: AsyncSession) -> AsyncSession:
    """Return a session for a package that calls `commit()`."""
    return cast(AsyncSession, CommitsLater(session))
