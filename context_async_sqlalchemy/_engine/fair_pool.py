"""A pool in which who has waited longest for a connection gets the next one, and few may wait."""

import asyncio
from collections import deque
from functools import partial
from typing import Any
from weakref import WeakSet

from sqlalchemy import AsyncAdaptedQueuePool, Pool
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from context_async_sqlalchemy._engine.private_names import pool_with_queues


class _Line:
    """Those that wait for a connection of an engine."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        # An engine that was disposed of has another pool: some may wait for the first one still.
        self.queues: WeakSet[_FairQueue] = WeakSet()

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self.queues)

    def check(self) -> None:
        """Refuse one more than may wait."""
        if self.limit is not None and len(self) >= self.limit:
            raise PoolTimeoutError(
                f"Every connection of the pool is in use, and {len(self)} others wait for one: "
                f"max_waiting is {self.limit}"
            )


class _FairQueue(asyncio.Queue[Any]):
    # asyncio's own only wakes who waits: whoever asks before that task runs takes the item, and who
    # was woken waits again, behind everybody else. A response that is sent in the step in which
    # its connection was given back brings the next request at just that moment.

    def __init__(self, line: _Line, maxsize: int) -> None:
        super().__init__(maxsize)
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self._line = line
        line.queues.add(self)

    def put_nowait(self, item: Any) -> None:
        while self.waiting:
            if not (waiter := self.waiting.popleft()).done():
                waiter.set_result(item)
                return
        super().put_nowait(item)

    async def get(self) -> Any:
        if not self.empty():
            return self.get_nowait()
        self._line.check()
        waiter = asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it has got the item meanwhile
                self.put_nowait(waiter.result())
            elif waiter in self.waiting:  # which it is not if it was passed over meanwhile
                self.waiting.remove(waiter)
            raise


class _FairLifoQueue(_FairQueue, asyncio.LifoQueue[Any]):
    pass


def fair_pool(max_waiting: int | None = None) -> type[AsyncAdaptedQueuePool]:
    """Return SQLAlchemy's pool for asyncio, with the fair queue, for one engine.

    Whoever would be one more than `max_waiting` gets the pool's error of a time-out at once.
    """
    line = _Line(max_waiting)
    pool = pool_with_queues(partial(_FairQueue, line), partial(_FairLifoQueue, line))
    setattr(pool, _LINE, line)
    return pool


def count_waiting(pool: Pool) -> int:
    """Return how many wait for a connection of a pool; 0 if it is of another class."""
    return len(getattr(pool, _LINE, ()))


_LINE = "context_async_sqlalchemy_line"
