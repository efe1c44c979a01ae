"""Greenlets that are used again: for the frames of a new one, Python maps and unmaps memory.

It takes a third of the time of a new one, of which a request needs one for each statement, and one
for COMMIT.
"""

import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from threading import local
from typing import Any

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.private_names import (
    Provider,
    greenlet_spawn,
    in_greenlet,
    methods_that_spawn,
)

_KEPT = 64  # by each thread, 20 KiB each


async def _run_in_greenlet(
    function: Callable[..., Any], *args: Any, _require_await: bool = False, **options: Any
) -> Any:
    if _require_await:
        return await greenlet_spawn(function, *args, _require_await=True, **options)
    here = getcurrent()
    kept = _idle.greenlets
    worker = kept.pop() if kept else _new_worker()
    worker.parent = here
    worker.gr_context = here.gr_context  # the context variables are those of this task
    waited_for = worker.switch(function, args, options)
    while waited_for is not worker:
        try:
            result = await waited_for
        except BaseException:
            waited_for = worker.throw(*sys.exc_info())
        else:
            waited_for = worker.switch(result)
    # It would keep what this task has alive.
    result, error = worker.result, worker.error
    worker.gr_context = worker.result = worker.error = None
    if len(kept) < _KEPT:
        kept.append(worker)
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame
    return result


class _Worker(Provider, greenlet):  # type: ignore[misc]
    result: Any
    error: BaseException | None


def _new_worker() -> _Worker:
    worker = _Worker(_work)
    worker.result = worker.error = None
    worker.switch()
    return worker


def _work() -> None:
    worker = getcurrent()
    while True:
        function, args, options = worker.parent.switch(worker)
        try:
            worker.result = function(*args, **options)
        except BaseException as error:
            worker.error = error
        del function, args, options


class _Idle(local):
    def __init__(self) -> None:
        self.greenlets: list[Any] = []


_idle = _Idle()

# How to call a function that waits inside.
run_in_greenlet = _run_in_greenlet if _Worker(in_greenlet).switch() else greenlet_spawn

_METHODS = methods_that_spawn(run_in_greenlet)
_METHODS.pop("close", None)  # of a session in a context, which seldom waits


def methods_in_greenlets(cls: type[AsyncSession]) -> dict[str, Callable[..., Awaitable[Any]]]:
    """Return the methods of SQLAlchemy's that a class of sessions has, run in such greenlets."""
    return {
        name: _while_it_is(cls, name, method)
        for name, method in _METHODS.items()
        if getattr(cls, name) is getattr(AsyncSession, name)
    }


def _while_it_is(
    cls: type[AsyncSession], name: str, method: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    """Return `method`, but what the class has by then if it is another one, as in a test."""
    original = getattr(cls, name)

    @wraps(original)
    async def call(session: AsyncSession, *args: Any, **options: Any) -> Any:
        now = getattr(cls, name)
        return await (method if now is original else now)(session, *args, **options)

    return call
