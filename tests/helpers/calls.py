"""Callbacks that are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Calls(list[str]):
    """The names of the callbacks that were called, in order."""

    def callback(self, name: str) -> Callable[[], Awaitable[None]]:
        """Make an async callback."""

        async def callback() -> None:
            await asyncio.sleep(0)
            self.append(name)

        return callback
