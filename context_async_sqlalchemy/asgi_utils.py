"""The ASGI middleware: a context for each request, committed before the response starts."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from context_async_sqlalchemy.auto_commit import (
    BeforeCommitCallback,
    abandon,
    finish,
    is_success,
    settle,
)
from context_async_sqlalchemy.context import DBSessionContext, is_test_context, open_context
from context_async_sqlalchemy.guards import is_in_use
from context_async_sqlalchemy.release import wait_until_idle
from context_async_sqlalchemy.shield import logger

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_SCOPE_KEY = "context_async_sqlalchemy"


class ASGIHTTPDBSessionMiddleware:
    """Give each HTTP request a context, and settle it before the response starts.

    The transaction is committed before `http.response.start` is forwarded, or rolled back,
    depending on the status. What the application does after that (a streamed body, a background
    task) is committed before the last part of the body is forwarded, and when it returns. If the
    application raises, or returns before its response is complete, what is open is rolled back.
    Every session is closed in the end.

    WebSockets get no context: they have no moment of success. Open one for each message, with
    `new_db_session_ctx`.

    Args:
        app: The ASGI application.
        before_commit: Called with each session that is about to be committed. Default None.
        commit_on: Decides by the status of the response whether to commit. Default: below 400.

    Raises:
        TypeError: If `before_commit` or `commit_on` is not callable.
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        commit_on: Callable[[int], bool] = is_success,
    ) -> None:
        if not (before_commit is None or callable(before_commit)):
            raise TypeError("before_commit must be a function that takes a session")
        if not callable(commit_on) or inspect.iscoroutinefunction(commit_on):
            raise TypeError("commit_on must be a function that takes a status and returns a bool")
        self.app = app
        self.before_commit = before_commit
        self.commit_on = commit_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or has_context(scope):
            await self.app(scope, receive, send)
            return

        context = open_request_context(scope)
        settling = _SettlingSend(self, context, send)
        try:
            try:
                await self.app(scope, receive, settling)
            except Exception:
                if settling.failure is None or settling.started:
                    raise
            if settling.failure is not None and not settling.started:
                # What became of it inside does not matter: the application took it for a success.
                await self.respond_to_failure(settling.failure, scope, receive, settling)
        except BaseException as error:
            await abandon(context, error)
            raise
        else:
            await finish(context, commit=settling.succeeded(), before_commit=self.before_commit)

    async def respond_to_failure(
        self, failure: Exception, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request whose commit failed with `failure`; here: raise it."""
        raise failure


class _SettlingSend:
    """The `send` of a request, which settles its context before the response starts.

    Attributes:
        started: Whether a response has started.
        completed: Whether the last part of its body was sent.
        commit: Whether the status of the response asks for a commit.
        failure: The error of the settling that kept a response from starting.
    """

    __slots__ = ("commit", "completed", "context", "failure", "middleware", "send", "started")

    def __init__(
        self, middleware: ASGIHTTPDBSessionMiddleware, context: DBSessionContext, send: Send
    ) -> None:
        self.middleware = middleware
        self.context = context
        self.send = send
        self.started = False
        self.completed = False
        self.commit = False
        self.failure: Exception | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.commit = self.middleware.commit_on(message["status"])
            if self.context.sessions:
                try:
                    await self._settle(self.commit)
                except Exception as error:
                    self.failure = error
                    raise
            self.started = True
        elif self.started and not message.get("more_body", False):
            if self.context.sessions:
                # Whoever has the whole body shall be able to rely on what it says.
                await self._settle(True)
            self.completed = True
        await self.send(message)

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
            if any(map(is_in_use, sessions)) and _runs_in_another_task(self.middleware.app):
                await wait_until_idle(sessions)
            before_commit = self.middleware.before_commit
            await settle(self.context, commit=commit, before_commit=before_commit)


def _runs_in_another_task(app: ASGIApp) -> bool:
    # Inside a BaseHTTPMiddleware of Starlette the application goes on with its body while its
    # response is started out here, and may be inside a statement, which is nobody's mistake then.
    inner: object = app
    while inner is not None:
        if any(cls.__name__ == "BaseHTTPMiddleware" for cls in type(inner).__mro__):
            return True
        inner = getattr(inner, "app", None) or getattr(inner, "middleware_stack", None)
    return False


def has_context(scope: Scope) -> bool:
    """Return whether a request takes part in a context that is there already.

    That is one opened by an outer middleware for the same request, or by a test. A context that is
    merely inherited is another client's: uvicorn starts a pipelined request from inside the task
    of the one before it.
    """
    context = scope.get(_SCOPE_KEY)
    return (context is not None and not context.closed) or is_test_context()


def open_request_context(scope: Scope) -> DBSessionContext:
    """Open a context for the request with this ASGI scope, and mark the scope as having one."""
    context = scope[_SCOPE_KEY] = open_context()
    return context
