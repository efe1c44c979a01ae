"""The host of a connect, and the one that a handler leaves for the session made after it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from context_async_sqlalchemy._engine.checks import check_host

SessionMaker: TypeAlias = async_sessionmaker[Any]


class Opened(NamedTuple):
    """An engine, its sessionmaker, and the host they talk to."""

    host: str | None
    engine: AsyncEngine
    session_maker: SessionMaker


class Choice:
    """What a handler does with the host, in its own task and in those that it starts."""

    def __init__(self) -> None:
        self.seen: str | None = None  # the host that it has read last
        self.host: str | None = None  # the host that it has set last
        self.opened: Opened | None = None  # the engine for that one, if it has one here
        self._loop = asyncio.get_running_loop()

    def set(self, host: str, opened: Opened | None) -> None:
        """Note that the handler has set `host`; `opened` is in use on the running loop."""
        self.host, self.opened = host, None
        if opened is not None and opened.host == host:
            # A thread that it waits for may have a loop of its own.
            self.opened = opened if asyncio.get_running_loop() is self._loop else None


class Host:
    """The host that new sessions of a connect talk to."""

    def __init__(self, host: str | None) -> None:
        self.now = check_host(host) if host is not None else None
        self._choice: ContextVar[Choice | None] = ContextVar("choice", default=None)

    def read(self) -> str | None:
        """Return the host; a handler may decide by it."""
        if (choice := self._choice.get()) is not None:
            choice.seen = self.now
        return self.now

    def set(self, host: str, opened: Opened | None = None) -> None:
        """Let new sessions talk to `host`; `opened` is in use on the running loop."""
        self.now = host
        if (choice := self._choice.get()) is not None:
            choice.set(host, opened)

    async def choose(self, handler: Callable[[], Awaitable[None]]) -> Choice:
        """Run a handler; return what it has chosen, whatever other tasks do meanwhile.

        If it only reads a host that another task changes before it has ended, it is run again.
        """
        while True:
            choice = Choice()
            token = self._choice.set(choice)
            try:
                await handler()
            finally:
                self._choice.reset(token)
            if choice.host is not None or choice.seen in (None, self.now):
                return choice
