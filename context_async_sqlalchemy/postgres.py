"""Which of several PostgreSQL hosts to talk to: handlers for `before_create_session_handler`."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy import Row, text

from context_async_sqlalchemy._engine.guard import closing
from context_async_sqlalchemy._engine.log import hide_password, logger
from context_async_sqlalchemy._engine.loops import PerLoop
from context_async_sqlalchemy.connect import DBConnect

Handler: TypeAlias = Callable[[DBConnect[Any]], Awaitable[None]]

_BEST = 0

# https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-RECOVERY-INFO
# A standby that has replayed all it has received is not behind, as long as it is connected to its
# primary. Otherwise the age of its last transaction is its lag: too much, if the primary writes
# nothing.
_STATE = text(
    """
    SELECT pg_is_in_recovery() AS is_replica,
      CASE WHEN pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn()
             AND EXISTS (SELECT FROM pg_stat_wal_receiver) THEN 0
           ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())
      END AS lag
    """
)


def keep_on_primary(
    hosts: Sequence[str], *, check_after: float = 1.0, timeout: float = 2.0
) -> Handler:
    """Make a handler that keeps a connect on the primary among `hosts`.

        connect = DBConnect.from_url(
            "postgresql://app@db1/shop",
            before_create_session_handler=keep_on_primary(["db1", "db2"]),
        )

    After a failover it finds the standby that was promoted. The primary is the host that is not in
    recovery; that there is only one is up to what promotes them. If there is none, the connect
    stays where it is, and its errors come through.

    Args:
        hosts: The hosts, as the connect's `engine_creator` takes them.
        check_after: The seconds for which a host that was found is not asked again. Default 1.
        timeout: The seconds that a host has to answer. Default 2.

    Raises:
        TypeError: If `hosts` is a string.
        ValueError: If `hosts` is empty, or has an empty one; or if a time is not above 0.
    """

    def rank(state: Row[Any]) -> int | None:
        return None if state.is_replica else _BEST

    return _HostChooser(hosts, rank, "a primary", check_after, timeout)


def keep_on_replica(
    hosts: Sequence[str], *, max_lag: float = 10.0, check_after: float = 1.0, timeout: float = 2.0
) -> Handler:
    """Make a handler that keeps a connect on a replica among `hosts` which is not far behind.

    Each process chooses one at random, and another one when that falls behind or does not answer.
    While there is none, the primary is used, if it is among the hosts. The lag of a replica that
    has lost its primary is the age of the last transaction that it has.

    Args:
        hosts: The hosts, as the connect's `engine_creator` takes them.
        max_lag: The seconds that a replica may be behind. Default 10.
        check_after: The seconds for which a host that was found is not asked again. Default 1.
        timeout: The seconds that a host has to answer. Default 2.

    Raises:
        TypeError: If `hosts` is a string.
        ValueError: If `hosts` is empty, or has an empty one; or if a time is not above 0.
    """
    if not max_lag > 0:
        raise ValueError(f"max_lag must be more than 0 seconds, not {max_lag}")

    def rank(state: Row[Any]) -> int | None:
        if not state.is_replica:
            return _BEST + 1
        return _BEST if state.lag is not None and state.lag <= max_lag else None

    return _HostChooser(hosts, rank, "a replica", check_after, timeout)


class _HostChooser:
    """Asks the hosts what they are, once in a while, and switches a connect to the best one."""

    def __init__(
        self,
        hosts: Sequence[str],
        rank: Callable[[Row[Any]], int | None],
        wanted: str,
        check_after: float,
        timeout: float,
    ) -> None:
        if isinstance(hosts, str):
            raise TypeError("hosts must be a list of hosts, not one string")
        if not hosts or not all(hosts):
            raise ValueError("hosts must not be empty, nor any of them")
        for name, seconds in ("check_after", check_after), ("timeout", timeout):
            if not seconds > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {seconds}")
        self._hosts = list(hosts)
        self._rank = rank
        self._wanted = wanted
        self._check_after = check_after
        self._timeout = timeout
        self._checks: PerLoop[dict[str, asyncio.Task[None]]] = PerLoop(dict)
        self._checked: dict[str, float] = {}
        self._on_fallback: set[str] = set()

    async def __call__(self, connect: DBConnect) -> None:
        key, checks = connect.context_key, self._checks.here()
        if key not in checks:
            checked = self._checked.get(key)
            if checked is not None and time.monotonic() - checked < self._check_after:
                return
            # A task: it goes on when whoever has begun it is cancelled, and all get its answer.
            checks[key] = asyncio.create_task(self._check(connect))
            checks[key].add_done_callback(partial(self._forget, checks, key))
        if key not in self._on_fallback:  # a fallback serves while a better host is looked for
            await asyncio.shield(checks[key])

    async def _check(self, connect: DBConnect) -> None:
        key, host = connect.context_key, connect.host
        rank = await self._ask(connect, host) if host in self._hosts else None
        if rank != _BEST:
            others = [other for other in self._hosts if other != host]
            ranks = await asyncio.gather(*(self._ask(connect, other) for other in others))
            found = list(zip(ranks, others, strict=True))
            if host is not None:
                found.append((rank, host))
            rank = await self._choose(connect, found)
        if rank == _BEST:
            self._on_fallback.discard(key)
        elif rank is not None:
            self._on_fallback.add(key)
        self._checked[key] = time.monotonic()

    async def _choose(self, connect: DBConnect, found: list[tuple[int | None, str]]) -> int | None:
        best = min((rank for rank, _ in found if rank is not None), default=None)
        candidates = [host for rank, host in found if rank == best]
        if best is None:
            hosts = hide_password(", ".join(self._hosts))
            logger.warning("None of the hosts %s is %s", hosts, self._wanted)
            if connect.host is None:
                await connect.change_host(self._hosts[0])  # its error comes through
        elif connect.host not in candidates:
            await connect.change_host(random.choice(candidates))
        return best

    def _forget(
        self, checks: dict[str, asyncio.Task[None]], key: str, check: asyncio.Task[None]
    ) -> None:
        del checks[key]
        if not check.cancelled() and check.exception() is not None:
            # The tasks that wait for it get the error; there may be none left.
            logger.info("The hosts could not be asked", exc_info=check.exception())

    async def _ask(self, connect: DBConnect, host: str) -> int | None:
        """Return how good a host is, the smaller the better; None if it is of no use."""
        try:
            async with asyncio.timeout(self._timeout):
                # Not a connection of the pool: that may be full, and its host dead.
                engine = await connect._engines.make_engine(host)
                async with closing(engine), engine.connect() as connection:
                    return self._rank((await connection.execute(_STATE)).one())
        except Exception as error:
            logger.info(
                "The host %s does not say what it is: %s", hide_password(host), type(error).__name__
            )
            return None
