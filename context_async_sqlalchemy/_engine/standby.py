"""What a process knows of a replica: how far it has replayed, and whether it answers."""

import asyncio
import math
from contextvars import Context
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine

from context_async_sqlalchemy._engine.greenlets import run_in_greenlet
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.shield import result_within
from context_async_sqlalchemy._engine.transaction_settings import has_transaction_settings

# A primary has everything: after a promotion, the position is that of its beginning.
_REPLAYED = text(
    """
    SELECT CASE WHEN pg_is_in_recovery()
      THEN coalesce(pg_last_wal_replay_lsn() - CAST('0/0' AS pg_lsn), 0) END
    """
)
_INTERVAL, _REMINDS = 0.02, 60.0  # seconds
_STANDBY = "_context_async_sqlalchemy_standby"
_SILENT, _BEHIND = "does not answer", "is behind"


class Times(NamedTuple):
    """How long things may take, in seconds."""

    patience: float
    timeout: float
    check_after: float
    retry_after: float


async def ask(engine: AsyncEngine, question: TextClause) -> Any:
    """Return the one value of a query, in one round trip if that can be, and in one greenlet."""
    return await run_in_greenlet(_ask, engine, question)


def _ask(engine: AsyncEngine, question: TextClause) -> Any:
    with engine.sync_engine.connect() as connection:
        if not has_transaction_settings(engine):
            connection.execution_options(isolation_level="AUTOCOMMIT")
        return connection.scalar(question)


class Standby:
    """What is known of the server of an engine, whoever asks; `of` returns it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._replayed = -1.0  # bytes of the log
        self._asked = self._pause_until = -math.inf
        self._asking: asyncio.Task[None] | None = None
        self._told, self._told_at = "", -math.inf  # of what the last warning has told

    @classmethod
    def of(cls, engine: AsyncEngine) -> "Standby":
        """Return what is known of the server of `engine`."""
        kept = vars(engine.sync_engine)
        standby: Standby = kept.get(_STANDBY) or kept.setdefault(_STANDBY, cls(engine))
        return standby

    @property
    def is_promoted(self) -> bool:
        """Whether it is a primary, as far as is known: then it takes what is written."""
        return self._replayed == math.inf

    def doubt(self) -> None:
        """Ask before the next use: a connection was lost."""
        self._asked = -math.inf

    def tell(self, what: str, error: Exception | None = None) -> None:
        """Warn, once and not for each request, of why the primary is read."""
        if self._told != what or monotonic() - self._told_at > _REMINDS:
            self._told_at = monotonic()
            why = f" ({type(error).__name__})" if error is not None else ""
            host = self._engine.url.host
            logger.warning("The server %s %s%s: the primary is read instead", host, what, why)
        self._told = what

    async def has_replayed(self, position: int, times: Times) -> bool:
        """Return whether it answers, and has replayed up to a position; wait for it for a while."""
        begin = monotonic()
        if begin < self._pause_until:
            return False
        if position <= self._replayed and begin - self._asked < times.check_after:
            return True
        if self._told == _SILENT:
            self._pause_until = begin + times.retry_after  # this one tries, and no other waits
        while True:
            # However many wait, one asks; and who waits holds no connection.
            if self._asking is None:
                # For all of them, so not in the context of the one: it is no query of its request.
                self._asking = asyncio.create_task(self._ask(times), context=Context())
            await asyncio.wait([self._asking])
            if self._told == _SILENT:
                return False
            if position <= self._replayed:
                break
            if monotonic() - begin >= times.patience:
                self.tell(_BEHIND)
                return False
            await asyncio.sleep(_INTERVAL)
        return True

    async def _ask(self, times: Times) -> None:
        try:
            # A server that says nothing takes the driver seconds more to hang up on.
            replayed = await result_within(times.timeout, ask(self._engine, _REPLAYED))
        except Exception as error:
            self._pause_until = monotonic() + times.retry_after
            self.tell(_SILENT, error)
        else:
            self._replayed = math.inf if replayed is None else int(replayed)
            self._asked, self._pause_until = monotonic(), -math.inf
            if self._told == _SILENT:
                self._told = ""
                logger.info("The server %s answers again", self._engine.url.host)
        finally:
            self._asking = None
