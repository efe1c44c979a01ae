"""What a creator returns: awaited, or had at once by who cannot wait."""

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

ResultOf: TypeAlias = Callable[[Any], Awaitable[Any]]


class WouldWaitError(Exception):
    """There is something to wait for."""


async def result_of(made: Awaitable[T] | T) -> T:
    """Return what a creator has returned, awaited if that is what it asks for."""
    return await made if inspect.isawaitable(made) else made


def without_waiting(make: Callable[[ResultOf], Coroutine[Any, Any, T]]) -> T:
    """Return what `make` returns, if it waits for nothing but the results of creators.

    `WouldWaitError` if it asks for one that is to be awaited, which does not begin then.
    """
    making = make(_result_at_hand)
    try:
        making.send(None)
    except StopIteration as made:
        return made.value  # type: ignore[no-any-return]
    raise AssertionError("it has waited")  # pragma: no cover


async def _result_at_hand(made: Any) -> Any:
    if inspect.isawaitable(made):
        getattr(made, "close", bool)()  # or Python would warn that a coroutine was never awaited
        raise WouldWaitError
    return made
