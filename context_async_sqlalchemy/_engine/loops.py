"""An object for each event loop."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Objects that belong to an event loop each, made when a loop first asks for its own."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._by_loop: dict[asyncio.AbstractEventLoop, T] = {}

    def here(self) -> T:
        """Return the object of the running loop."""
        loop = asyncio.get_running_loop()
        thing = self._by_loop.get(loop)
        if thing is None:
            for other in [other for other in list(self._by_loop) if other.is_closed()]:
                self._by_loop.pop(other, None)
            thing = self._by_loop.setdefault(loop, self._make())
        return thing

    def elsewhere(self) -> list[tuple[asyncio.AbstractEventLoop, T]]:
        """Return the objects of the other loops that are running now, in other threads."""
        here = asyncio.get_running_loop()
        return [
            (loop, thing)
            for loop, thing in list(self._by_loop.items())
            if loop is not here and loop.is_running()
        ]
