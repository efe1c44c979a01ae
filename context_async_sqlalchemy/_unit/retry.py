"""A unit of work is done again after a transient error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from context_async_sqlalchemy._engine.checks import check_before_commit
from context_async_sqlalchemy._engine.driver_errors import is_transient_error
from context_async_sqlalchemy._unit.blocks import new_db_session_ctx
from context_async_sqlalchemy._unit.context import DBSessionContext, current_context
from context_async_sqlalchemy._unit.notes import note_once
from context_async_sqlalchemy._unit.on_commit import watch_commits
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback

if TYPE_CHECKING:
    from stamina import Attempt

P = ParamSpec("P")
T = TypeVar("T")


def retry_on_transient_error(
    attempts: int = 3,
    *,
    timeout: float | None = None,
    wait_initial: float = 0.05,
    wait_max: float = 5.0,
    wait_jitter: float = 0.1,
    before_commit: BeforeCommitCallback | None = None,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Run an async function in a new context, and again in another one after a transient error.

        @retry_on_transient_error(attempts=5)
        async def transfer(source: int, target: int, amount: int) -> None:
            session = await db_session(connect)
            ...

    Each attempt is a unit of work, like a block of `new_db_session_ctx`: committed if the function
    returns, rolled back if it raises. The last error is raised unchanged. An attempt that has
    committed a part of its work is not repeated. Side effects outside of the database happen in
    each attempt: leave them to `on_commit`.

    `stamina` does the waiting and the repeating; its documentation has the instrumentation,
    `stamina.set_testing` and `stamina.set_active`. Install the extra "retry".

    Args:
        attempts: How often to call the function at most. Default 3.
        timeout: The seconds after which not to try again. Default None: no limit.
        wait_initial: The seconds to wait before the second attempt, doubled for each that follows.
            Default 0.05.
        wait_max: The most seconds to wait between two attempts. Default 5.
        wait_jitter: The most seconds to add to a wait, at random. Default 0.1.
        before_commit: Called with each session that is about to be committed. Default None.

    Raises:
        ImportError: If stamina is not installed.
        TypeError: If the decorated object is not an async function, or `before_commit` is not
            callable.
        ValueError: If `attempts` is less than 1.
    """
    if callable(attempts):
        raise TypeError("write @retry_on_transient_error(), with parentheses")
    check_before_commit(before_commit)
    retrying = Retrying(attempts, timeout, wait_initial, wait_max, wait_jitter)

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(
                f"retry_on_transient_error decorates an async function, not {function!r}"
            )

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            context: DBSessionContext

            def is_repeatable(error: BaseException) -> bool:
                return may_be_repeated(error, context)

            async for attempt in retrying(is_repeatable, name):
                with attempt:
                    async with new_db_session_ctx(before_commit):
                        context = current_context()
                        watch_commits(context)
                        return await function(*args, **kwargs)
            raise AssertionError("stamina raises the last error")

        name = f"{call.__module__}.{call.__qualname__}"
        return call

    return decorate


class Retrying:
    """How often to try, and how long to wait in between, with stamina."""

    def __init__(
        self,
        attempts: int,
        timeout: float | None = None,
        wait_initial: float = 0.05,
        wait_max: float = 5.0,
        wait_jitter: float = 0.1,
    ) -> None:
        if not isinstance(attempts, int):
            raise TypeError(f"attempts must be an int, not {type(attempts).__name__}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {attempts}")
        try:
            import stamina
        except ImportError as error:
            raise ImportError(
                "Trying again needs stamina: 'pip install stamina', or install "
                'context-async-sqlalchemy with its extra "retry"'
            ) from error
        self.attempts = attempts
        self._retry_context = functools.partial(
            stamina.retry_context,
            attempts=attempts,
            timeout=timeout,
            wait_initial=wait_initial,
            wait_max=wait_max,
            wait_jitter=wait_jitter,
        )

    def __call__(self, on: Callable[[Exception], bool], name: str) -> AsyncIterator[Attempt]:
        """Return the attempts: `on` says whether to try again; `name` is for instrumentation."""
        # Without the arguments: stamina would log them, and they may be secret.
        return self._retry_context(on).with_name(name, (), {})


def may_be_repeated(error: BaseException, context: DBSessionContext) -> bool:
    """Return whether the work of `context`, which has failed with `error`, may be done again."""
    if not is_transient_error(error):
        return False
    if watch_commits(context).durable:
        note_once(
            error, "Not tried again: a part of its work had been committed, or may have been."
        )
        return False
    return True
