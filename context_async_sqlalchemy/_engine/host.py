"""The host of a connect, and the one that a handler leaves for the session made after it."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from context_async_sqlalchemy._engine.checks import check_host


class Host:
    """The host that new sessions of a connect talk to."""

    def __init__(self, host: str | None) -> None:
        self.now = check_host(host) if host is not None else None
        self._choice: ContextVar[_Choice | None] = ContextVar("choice", default=None)

    def read(self) -> str | None:
        """Return the host; a handler may decide by it."""
        if (choice := self._choice.get()) is not None:
            choice.seen = self.now
        return self.now

    def set(self, host: str) -> None:
        """Let new sessions talk to `host`."""
        self.now = host
        if (choice := self._choice.get()) is not None:
            choice.host = host

    async def chosen_by(self, handler: Callable[[], Awaitable[None]]) -> str | None:
        """Run a handler; return the host that it has set, or else the one that it has read.

        None if it has done neither. What other tasks do meanwhile does not count; but a handler
        that has read a host which another task changes before its end is run again.
        """
        while True:
            choice = _Choice()
            token = self._choice.set(choice)
            try:
                await handler()
            finally:
                self._choice.reset(token)
            if choice.host is not None or choice.seen in (None, self.now):
                return choice.host or choice.seen


class _Choice:
    """What a handler does with the host, in its own task and in those that it starts."""

    def __init__(self) -> None:
        self.seen: str | None = None  # the host that it has read last
        self.host: str | None = None  # the host that it has set last
