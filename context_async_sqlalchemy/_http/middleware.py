"""The ASGI middleware: a context for each request, committed before the response starts."""

from collections.abc import Callable
from functools import partial

from context_async_sqlalchemy._engine.checks import check_before_commit
from context_async_sqlalchemy._http.hand_over import RECIPIENT, see_hand_over
from context_async_sqlalchemy._http.options import (
    MiddlewareOptions as MiddlewareOptions,
    checked_commit_on,
    warn_of_ignored,
)
from context_async_sqlalchemy._http.replay import Replay
from context_async_sqlalchemy._http.send import SettlingSend
from context_async_sqlalchemy._http.sub_request import is_same_request
from context_async_sqlalchemy._unit.context import DBSessionContext, is_test_context
from context_async_sqlalchemy._unit.hidden import receive_hidden
from context_async_sqlalchemy._unit.settle import (
    BeforeCommitCallback,
    abandon,
    finish,
    is_success,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send

SCOPE_KEY = "context_async_sqlalchemy"


def open_request_context(scope: Scope, layer: object) -> DBSessionContext:
    """Open a context for the request with this ASGI scope, and mark the scope as having one."""
    context = scope[SCOPE_KEY] = DBSessionContext(scope, layer)
    context.enter()
    return context


class ASGIHTTPDBSessionMiddleware:
    """Give each HTTP request a context, and settle it before the response starts.

    The transaction is committed before `http.response.start` is forwarded, or rolled back,
    depending on the status. What the application does after that (a streamed body, a background
    task) is committed before the last part of the body is forwarded, and when it returns. If the
    application raises, or returns before its response is complete, what is open is rolled back.
    Every session is closed in the end.

    WebSockets get no context: they have no moment of success. Open one for each message, with
    `new_db_session_ctx`.

    With `attempts`, a request that fails with a transient error (`is_transient_error`) before
    anything was sent is rolled back, and the application called again with the same scope and body,
    after a pause that `stamina` chooses (install the extra "retry"). This holds even if an
    exception handler of the application answers the error (from within `except`, as in Starlette):
    only the answer to the last attempt is sent. A request is not repeated if its body is larger
    than `replay_body_limit`, if its client has left, or if a part of its work is committed or may
    be.

    Args:
        app: The ASGI application.
        before_commit: Called with each session that is about to be committed. Default None.
        commit_on: Decides by the status of the response whether to commit. Default: below 400.
        attempts: How often to call the application for a request at most. Default 1.
        replay_body_limit: How many bytes of a request's body to keep for another attempt. Default
            1 MiB.

    Raises:
        ImportError: If `attempts` is more than 1 and stamina is not installed.
        TypeError: If `before_commit` or `commit_on` is not callable, or a number is none.
        ValueError: If `attempts` is less than 1, or `replay_body_limit` less than 0.
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        commit_on: Callable[[int], bool] = is_success,
        attempts: int = 1,
        replay_body_limit: int = 1024 * 1024,
    ) -> None:
        check_before_commit(before_commit)
        if replay_body_limit < 0:
            raise ValueError(f"replay_body_limit must be at least 0, not {replay_body_limit}")
        self.app = app
        self.before_commit = before_commit
        self._sees_hand_over = False
        self.commit_on = checked_commit_on(commit_on)
        self._options = {
            "before_commit": before_commit,
            "commit_on": commit_on,
            "attempts": attempts,
            "replay_body_limit": replay_body_limit,
        }
        self._is_nested = False  # for all that is known yet
        self._replay = Replay(self, attempts, replay_body_limit) if attempts != 1 else None

    open_context = staticmethod(open_request_context)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or has_context(scope, self):
            if not self._is_nested and (context := scope.get(SCOPE_KEY)) is not None:
                self._is_nested = True
                warn_of_ignored(self._options, context.options, context.name)
            await self.app(scope, receive, send)
            return
        if not self._sees_hand_over:  # when the application has all its middlewares
            self._sees_hand_over = True
            see_hand_over(self.app)
        if self._replay is None:
            await self._serve(self.app, scope, receive, send)
        else:
            await self._replay(scope, receive, send)

    async def _serve(
        self,
        app: ASGIApp,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Call the application for a request, in a context of its own."""
        context = self.open_context(scope, self)
        context.options = self._options
        settling = SettlingSend(context, send, self.before_commit, self.commit_on)
        scope[RECIPIENT] = settling
        try:
            try:
                await app(scope, partial(receive_hidden, receive), settling.forward)
            except Exception:
                if settling.failure is None or settling.started:
                    raise
            if settling.failure is not None and not settling.started:
                # What became of it inside does not matter: the application took it for a success.
                settling.error = settling.answered = None
                await self.respond_to_failure(settling.failure, scope, receive, settling.forward)
        except BaseException as error:
            await abandon(context, error, has_answered=settling.started)
            raise
        else:
            commit = settling.succeeded()
            await finish(context, commit=commit, before_commit=self.before_commit)
        finally:
            # The server's `send` may refer to the scope, and the error to all of this.
            scope.pop(RECIPIENT, None)
            settling.error = settling.answered = None

    async def respond_to_failure(
        self, failure: Exception, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request whose commit failed with `failure`. This class raises it."""
        raise failure


def has_context(scope: Scope, layer: object = None) -> bool:
    """Return whether a request that comes to a layer takes part in a context that is open already.

    It does if an outer layer opened it for the same request, or a test did. A context that is
    merely inherited is another client's.
    """
    if SCOPE_KEY not in scope or (context := scope[SCOPE_KEY]).closed:
        return is_test_context()
    return layer is None or is_same_request(context, scope, layer)


def application_around(scope: Scope) -> object:
    """Return the application in which the context of a request was opened, not a mounted one."""
    return scope[SCOPE_KEY].app if SCOPE_KEY in scope else scope.get("app")
