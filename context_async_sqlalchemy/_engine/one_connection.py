"""A StaticPool gives its one connection to one session at a time."""

import asyncio
from functools import cached_property

from sqlalchemy import Pool, StaticPool
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from context_async_sqlalchemy._engine.loops import PerLoop
from context_async_sqlalchemy._engine.private_names import WatchedStaticPool, await_only

TIMEOUT = 30.0  # seconds, as in SQLAlchemy's other pools


def take_turns(pool: Pool) -> None:
    """Let sessions take turns on the connection of a pool, if that is a `StaticPool`.

    SQLAlchemy makes such a pool for a SQLite database in memory, and gives the connection, and its
    transaction, to all at a time: one's rollback undoes what another one commits.
    """
    if isinstance(pool, StaticPool) and not isinstance(pool, _InTurns):
        # It may have opened its connection already, and in it is what is in memory.
        pool.__class__ = _InTurns


class _InTurns(WatchedStaticPool):
    __module__ = StaticPool.__module__  # SQLAlchemy names the logger of a pool after its class
    held: asyncio.Lock | None = None

    @cached_property
    def turns(self) -> PerLoop[asyncio.Lock]:
        return PerLoop(asyncio.Lock)

    def before_checkout(self) -> None:
        await_only(self._wait(self.turns.here()))

    def after_checkin(self) -> None:
        held, self.held = self.held, None
        if held is not None:  # as it is if it was taken before there were turns
            held.release()

    def dispose(self) -> None:
        if self.held is None:  # or else it is closed when it comes back
            super().dispose()

    async def _wait(self, turn: asyncio.Lock) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                await turn.acquire()
        except TimeoutError:
            raise PoolTimeoutError(
                "The one connection of this StaticPool was in use by another session for "
                f"{TIMEOUT:g} seconds. A task that holds one session open cannot wait for another."
            ) from None
        self.held = turn
