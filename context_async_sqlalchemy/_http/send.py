"""The `send` of a request, which settles its context before the response starts."""

import sys
from collections.abc import Awaitable, Callable

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._http.messages import ends_body, is_streamed
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy._unit.hidden import send_hidden
from context_async_sqlalchemy._unit.lost_work import tell_of_lost_work
from context_async_sqlalchemy._unit.settle import (
    BeforeCommitCallback,
    is_success,
    settle,
)
from context_async_sqlalchemy.asgi_types import Message, Send


class SettlingSend:
    """What the application sends, before the server gets it."""

    # Most requests need but a few of these: as an attribute of the class, each costs nothing.
    started = False
    completed = False  # the last part of the body was sent
    commit = False  # what the status of the response asks for
    failure: Exception | None = None  # kept a response from starting
    answered: BaseException | None = None  # what was handled while the answer was made
    error: Exception | None = None  # with which the body has ended
    is_cut_off = False  # the body has ended before its last part
    _handed_over: int | None = None  # the status, by the application itself
    _is_settled = False  # and what is open now is the body's

    def __init__(
        self,
        context: DBSessionContext,
        send: Send,
        before_commit: BeforeCommitCallback | None,
        commit_on: Callable[[int], bool],
    ) -> None:
        self.context = context
        self.send = send
        self.before_commit = before_commit
        self.commit_on = commit_on
        self._outer: tuple[BaseException | None, ...] = (sys.exception(),)  # the caller's affair

    # Not `__call__`, which Python calls in a slower way.
    async def forward(self, message: Message) -> None:
        """Send a message to the server."""
        if message["type"] == "http.response.start":
            if (settling := self.settle_by(message["status"])) is not None:
                await settling
            self.started = True
            self.answered, self._outer = None, ()  # the tracebacks of which refer to this object
        elif self.started and ends_body(message):
            if self.error is not None:
                raise self.error  # which another middleware has kept to itself
            if not self.is_cut_off:
                if not self.context.is_settled() and not self.context.settles_late:
                    # A client that has the whole body must be able to rely on what it says.
                    await settle(self.context, commit=True, before_commit=self.before_commit)
                self.completed = True
            await send_hidden(self.send, message)
            return
        await self.send(message)

    def hand_over(self, start: Message, outer: BaseException | None) -> Awaitable[None] | None:
        """Take the start of a response from the application itself.

        Who called it handles the error `outer`. What it did is settled now if the body is still to
        be made: that may begin before the response starts, and has a transaction of its own.
        """
        if self._handed_over is not None:
            return None
        self._handed_over = start["status"]
        if self.answered is not None or sys.exception() is not None:
            self._outer = (*self._outer, outer)
            self.answered = self.handled_error()
        if self.context.is_settled():
            self._is_settled = True
        elif is_streamed(start) and not self.context.settles_late:
            return self._settle_handed_over(start["status"])
        return None

    def end_early(self, error: BaseException | None) -> None:
        """Take it that the application has ended before its response was complete."""
        if error is None:
            self.is_cut_off = self._handed_over is not None  # as when the client has left
        elif self._handed_over is None:
            self.answered = error
        elif isinstance(error, Exception):  # or else somebody has no more use for it
            self.error = error

    def settle_by(self, status: int) -> Awaitable[None] | None:
        """Settle what is open, unless it is the body's, by the status of the response.

        Return what has to be waited for, if there is anything.
        """
        if self.error is not None and (sys.exception() is self.error or status >= 400):
            # Another middleware answers it, and what the body has begun is of no use.
            self.error, self._is_settled = None, False
        self.commit = self.asks_for_commit(status)
        if self._is_settled and (self.commit or status == self._handed_over):
            return None
        if self.context.is_settled():
            return None
        if not self.commit or self.context.rolls_back:
            tell_of_lost_work(self.context, status)
        return self._settle() if not self.context.settles_late else None

    def asks_for_commit(self, status: int) -> bool:
        """Return whether a response with this status, made now, asks for a commit."""
        commit = self.commit_on(status)
        if not commit or self.commit_on is not is_success:
            return commit
        if self.answered is None and sys.exception() is None:
            return True
        # An exception handler, such as Starlette's, answers from within `except`. An exception that
        # is an answer itself, such as an HTTPException, goes by its status.
        error = self.handled_error()
        return error is None or getattr(error, "status_code", None) == status

    def handled_error(self) -> BaseException | None:
        """Return the error that is, or was, handled while the response is made."""
        error = self.answered or sys.exception()
        return error if error not in self._outer else None

    def succeeded(self) -> bool:
        """Return whether to commit what is open when the application has returned."""
        if self.started and not self.completed and self.context.in_transaction():
            # Starlette stops the body of a client that hangs up, and returns as if it had ended.
            logger.warning(
                "A response was not completed, as when its client hangs up: what was written after "
                "it had started is rolled back."
            )
        return self.completed and (self.commit or not self.context.settles_late)

    async def _settle(self) -> None:
        try:
            await settle(self.context, commit=self.commit, before_commit=self.before_commit)
        except Exception as error:
            self.failure = error
            raise

    async def _settle_handed_over(self, status: int) -> None:
        if (settling := self.settle_by(status)) is not None:
            await settling
        self._is_settled = not self.context.in_transaction()
