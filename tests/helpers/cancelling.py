"""Work that is cancelled at one of its suspensions, chosen by its number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any

import anyio


class Steps:
    """Awaits a coroutine, and calls a function at one of its suspensions."""

    def __init__(self, work: Any, number: int, interrupt: Callable[[], object]) -> None:
        self._work = work
        self._number = number
        self._interrupt = interrupt
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        iterator = self._work.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                future = iterator.send(value) if error is None else iterator.throw(error)
            except StopIteration as stop:
                return stop.value
            self.suspensions += 1
            if self.suspensions == self._number:
                self._interrupt()
            value = error = None
            try:
                value = yield future
            except BaseException as raised:
                error = raised


async def cancel_at(number: int, work: Any, kind: str, pause: float = 0) -> int:
    """Run `work` in a task, cancelled at a suspension; return how many suspensions it had.

    A pause (in seconds) before the cancellation lets the server answer, without the event loop
    seeing the answer yet.
    """
    steps: Steps

    def paused(cancel: Callable[[], object]) -> Callable[[], object]:
        def pause_and_cancel() -> None:
            time.sleep(pause)
            cancel()

        return pause_and_cancel

    async def with_asyncio() -> None:
        nonlocal steps
        task = asyncio.current_task()
        assert task is not None
        steps = Steps(work, number, paused(task.cancel))
        await steps

    async def with_anyio() -> None:
        nonlocal steps
        with anyio.CancelScope() as scope:
            steps = Steps(work, number, paused(scope.cancel))
            await steps

    task = asyncio.create_task(with_asyncio() if kind == "asyncio" else with_anyio())
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
    return steps.suspensions
