"""The `send` of a request, which settles its context before the response starts."""

from __future__ import annotations

import sys
from collections.abc import Callable

from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Send
from context_async_sqlalchemy.auto_commit import BeforeCommitCallback, settle
from context_async_sqlalchemy.context import DBSessionContext
from context_async_sqlalchemy.guards import is_in_use
from context_async_sqlalchemy.release import wait_until_idle
from context_async_sqlalchemy.shield import logger


class SettlingSend:
    """The `send` that the application gets instead of the server's.

    Args:
        context: The context of the request.
        send: The server's `send`.
        app: The application.
        before_commit: Called with each session that is about to be committed.
        commit_on: Decides by the status of the response whether to commit.

    Attributes:
        sent: Whether anything was sent.
        started: Whether a response has started.
        completed: Whether the last part of its body was sent.
        commit: Whether the status of the response asks for a commit.
        failure: The error that kept a response from starting.
        is_repeatable: Decides whether to try again after an error; None in the last attempt.
        held: The answer to such an error, which is sent only if the request is not tried again.
    """

    def __init__(
        self,
        context: DBSessionContext,
        send: Send,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None,
        commit_on: Callable[[int], bool],
    ) -> None:
        self.send = send
        self.app = app
        self.before_commit = before_commit
        self.commit_on = commit_on
        self.sent = False
        self.started = False
        self.is_repeatable: Callable[[Exception], bool] | None = None
        self.begin(context)

    def begin(self, context: DBSessionContext) -> None:
        """Begin an attempt to answer the request."""
        self.context = context
        self.completed = False
        self.commit = False
        self.failure: Exception | None = None
        self.held: list[Message] = []

    async def __call__(self, message: Message) -> None:
        if self.held:
            self.held.append(message)
            if not message.get("more_body", False):
                # Not an Exception, which the application might catch: it must not go on after an
                # answer that is not sent.
                raise AnswerHeld
            return
        if message["type"] == "http.response.start":
            self.commit = self.commit_on(message["status"])
            if self.context.used:
                try:
                    await self._settle(self.commit)
                except Exception as error:
                    self.failure = error
                    raise
            if self.is_repeatable is not None and not self.commit:
                # An exception handler, such as Starlette's, answers from within `except`.
                answered = sys.exception()
                if isinstance(answered, Exception) and self.is_repeatable(answered):
                    self.failure = answered
                    self.held.append(message)
                    return
            self.started = True
        elif self.started and not message.get("more_body", False):
            if self.context.used:
                # A client that has the whole body must be able to rely on what it says.
                await self._settle(True)
            self.completed = True
        self.sent = True
        await self.send(message)

    async def forward_held(self) -> None:
        """Send the answer to the last failure: there is no other attempt."""
        held, self.held = self.held, []
        self.is_repeatable = None
        for message in held:
            await self(message)

    def succeeded(self) -> bool:
        """Return whether to commit what is open when the application has returned."""
        if self.started and not self.completed and self.context.in_transaction():
            # Starlette stops the body of a client that hangs up, and returns as if it had ended.
            logger.warning(
                "A response was not completed, as when its client hangs up: what was written after "
                "it had started is rolled back."
            )
        return self.completed and (self.commit or not self.context.settles_late)

    async def _settle(self, commit: bool) -> None:
        sessions = self.context.sessions
        if not self.context.settles_late:
            if any(map(is_in_use, sessions)) and _runs_in_another_task(self.app):
                await wait_until_idle(sessions)
            await settle(self.context, commit=commit, before_commit=self.before_commit)
            self.context.note_settled()


class AnswerHeld(BaseException):
    """Ends an attempt whose answer is not sent."""


def _runs_in_another_task(app: ASGIApp) -> bool:
    # Inside a BaseHTTPMiddleware of Starlette the application goes on with its body while its
    # response is started out here. That it may be inside a statement is not a mistake then.
    inner: object = app
    while inner is not None:
        if any(cls.__name__ == "BaseHTTPMiddleware" for cls in type(inner).__mro__):
            return True
        inner = getattr(inner, "app", None) or getattr(inner, "middleware_stack", None)
    return False
