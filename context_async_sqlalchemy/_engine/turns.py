"""Whose turn it is to be inside a session: one task's at a time, and of those it creates inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import QueuePool
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from context_async_sqlalchemy._engine.private_names import await_only, in_greenlet
from context_async_sqlalchemy._engine.shield import run_to_completion


class Scope:
    """A call of a session, or a block of it, such as one in a savepoint, and what is between calls.

    A task is inside of it that has begun it, or was created by one that was inside.
    """

    __slots__ = ("below", "has_ended", "is_block", "outer", "shared")

    def __init__(self, outer: Scope | None) -> None:
        self.outer = outer  # in which the task was already, of this session or another
        self.below: Scope | None = None  # of this session
        self.shared: Scope | None = None  # of another task, whose turn need not be waited for
        self.is_block = self.has_ended = False


# What this task is inside of, or its last call.
here: ContextVar[Scope | None] = ContextVar("session_scope", default=None)


class _Waiter:
    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.called = asyncio.get_running_loop().create_future()


class _Queue:
    """What waits for the turn that another task has."""

    def __init__(self) -> None:
        self.waiters: list[_Waiter] = []
        self.added: list[tuple[Scope, object]] = []  # to the session


def enter_blocks(session: AsyncSession) -> bool:
    """Let this task be inside the blocks of a session that others have begun.

    Return False if another one is inside a call of it, or waits for its turn.
    """
    sync_session: Any = session.sync_session
    try:
        turn, queue = sync_session._task_turn, sync_session._task_queue
    except AttributeError:  # tasks do not queue for it: it is in no context
        return True
    if turn is None and queue is None:
        return True
    mine = [*_around(here.get())]
    if (queue is not None and queue.waiters) or not all(
        scope.is_block for scope in _down(turn) if scope not in mine
    ):
        return False
    if turn is not None:
        inside = Scope(open_here())
        inside.shared = turn
        here.set(inside)
    return True


@asynccontextmanager
async def turn_of(session: AsyncSession) -> AsyncGenerator[None]:
    """Wait until no other task is inside a session, and let none in until the end of the block."""
    sync_session: Any = session.sync_session
    scope = Scope(open_here())
    await _wait(sync_session, scope)
    here.set(scope)
    try:
        yield
    finally:
        leave(sync_session, scope)


@contextmanager
def hold(session: AsyncSession) -> Generator[None]:
    """Let no other task in between the calls of a block, which has just begun with one."""
    sync_session: Any = session.sync_session
    if not hasattr(sync_session, "_task_turn"):  # tasks do not queue for it
        yield
        return
    block = begin_block(sync_session)
    try:
        yield
    finally:
        leave(sync_session, block)


def open_here() -> Scope | None:
    """Return the innermost scope, of any session, that this task is inside of."""
    return next((scope for scope in _around(here.get()) if not scope.has_ended), None)


def has_turn(session: Any) -> bool:
    """Return whether no other task is inside a session, be it in a block."""
    turn = getattr(session, "_task_turn", None)
    return turn is None or turn in _around(here.get())


def enter(session: Any, scope: Scope, is_shielded: bool = False) -> None:
    """Wait for the turn of `scope`, inside SQLAlchemy's greenlet, and begin it."""
    if session._task_flush is not None and not _may_enter(session, scope):
        session._task_flush.note_changes()
    is_next = _next(session) is None and _may_enter(session, scope)
    if is_next or not in_greenlet():
        push(session, scope)
    else:
        waiting = _wait(session, scope)
        await_only(run_to_completion(waiting) if is_shielded else waiting)


def push(session: Any, scope: Scope) -> None:
    """Begin the turn of `scope`, whose turn it is."""
    scope.below, session._task_turn = session._task_turn, scope


def leave(session: Any, scope: Scope) -> None:
    """End the turn of `scope`."""
    scope.has_ended = True
    while (turn := session._task_turn) is not None and turn.has_ended:
        session._task_turn = turn.below
    _call_next(session)


def begin_block(session: Any) -> Scope:
    """Begin a block, as the part of it that is between calls, until it is left."""
    block = Scope(open_here())
    block.is_block = True
    push(session, block)
    here.set(block)
    for waiter in session._task_queue.waiters if session._task_queue is not None else ():
        _wake(waiter)  # it does not wait for a block as long as for a call
    return block


def is_open(session: Any, scope: Scope) -> bool:
    """Return whether `scope` has begun, and not ended."""
    return scope in _down(session._task_turn)


def add_later(session: Any, instance: object) -> None:
    """Add an object to a session when no other task is inside of it."""
    scope = Scope(open_here())
    _queue_of(session).added.append((scope, instance))


async def _wait(session: Any, scope: Scope) -> None:
    """Wait for the turn of `scope`, and begin it."""
    waiter, queue = _Waiter(scope), _queue_of(session)
    queue.waiters.append(waiter)
    try:
        while _next(session) is not waiter:
            waiter.called = asyncio.get_running_loop().create_future()
            seconds = _timeout(session) if _is_blocked(session, scope) else None
            try:
                async with asyncio.timeout(seconds):
                    await waiter.called
            except TimeoutError:
                raise InvalidRequestError(_NO_TURN) from None
        push(session, scope)
    finally:
        queue.waiters.remove(waiter)
        _call_next(session)


def _queue_of(session: Any) -> _Queue:
    queue: _Queue | None = session._task_queue
    if queue is None:
        queue = session._task_queue = _Queue()
    return queue


def _call_next(session: Any) -> None:
    queue: _Queue | None = session._task_queue
    if queue is None:
        return
    added, queue.added = queue.added, []
    for scope, instance in added:
        if _may_enter(session, scope):
            Session.add(session, instance)
        else:
            queue.added.append((scope, instance))
    if (waiter := _next(session)) is not None:
        _wake(waiter)
    elif not queue.waiters and not queue.added:
        session._task_queue = None


def _may_enter(session: Any, scope: Scope) -> bool:
    turn = session._task_turn
    return turn is None or turn in _around(scope)


def _next(session: Any) -> _Waiter | None:
    waiters = session._task_queue.waiters if session._task_queue is not None else ()
    return next((waiter for waiter in waiters if _may_enter(session, waiter.scope)), None)


def _wake(waiter: _Waiter) -> None:
    if not waiter.called.done():
        waiter.called.set_result(None)


def _is_blocked(session: Any, scope: Scope) -> bool:
    """Return whether `scope` waits for a block, which may wait for its task."""
    around = [*_around(scope)]
    return any(other.is_block and other not in around for other in _down(session._task_turn))


def _timeout(session: Session) -> float:
    # As long as for a connection.
    pool = getattr(session.bind, "pool", None)
    return pool.timeout() if isinstance(pool, QueuePool) else 30.0


def _around(scope: Scope | None) -> Iterator[Scope]:
    while scope is not None:
        yield scope
        if scope.shared is not None:
            yield scope.shared
        scope = scope.outer


def _down(scope: Scope | None) -> Iterator[Scope]:
    while scope is not None:
        yield scope
        scope = scope.below


_NO_TURN = (
    "Another task of this context is inside a block 'async with session.begin_nested():' of the "
    "same session, and has been for longer than pool_timeout: a statement of this task would be "
    "rolled back with it. Does the block wait for this task? Create the task inside of the block, "
    "or give it a session of its own with 'await run_in_new_ctx(f)'."
)
