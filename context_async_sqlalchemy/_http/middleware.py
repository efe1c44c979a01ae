"""The ASGI middleware: a context for each request, committed before the response starts."""

from collections.abc import Callable, Collection

from context_async_sqlalchemy._engine.checks import check_before_commit
from context_async_sqlalchemy._http.hand_over import see_hand_over
from context_async_sqlalchemy._http.options import (
    MiddlewareOptions as MiddlewareOptions,
    checked_commit_on,
    checked_methods,
    reading,
    warn_of_ignored,
)
from context_async_sqlalchemy._http.replay import Replay
from context_async_sqlalchemy._http.same_request import has_context
from context_async_sqlalchemy._http.send import SCOPE_KEY, RequestContext
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback, abandon, finish, is_success
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send


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
        read_only_methods: With which `db_session(connect)` is `read_only=True`. Default: none.

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
        read_only_methods: Collection[str] = frozenset(),
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
            "read_only_methods": checked_methods(read_only_methods),
        }
        self.context_class = reading(self.context_class, frozenset(read_only_methods))
        self._is_nested = False  # for all that is known yet
        self._replay = Replay(self, attempts, replay_body_limit) if attempts != 1 else None

    context_class = RequestContext

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or has_context(scope, self):
            if not self._is_nested and (context := scope.get(SCOPE_KEY)) is not None:
                self._is_nested = True
                defaults = ASGIHTTPDBSessionMiddleware(self.app)._options
                outer = getattr(context.passed[0], "_options", defaults)
                warn_of_ignored(self._options, outer, defaults, context.name)
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
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, layer: object = None
    ) -> None:
        """Call the application for a request, in a context of its own, which a layer opens."""
        context = self.context_class(
            scope, layer or self, receive, send, self.before_commit, self.commit_on
        )
        context.open()
        try:
            try:
                await app(scope, context.receive, context.forward)
            except Exception:
                if context.failure is None or context.start is not None:
                    raise
            if context.failure is not None and context.start is None:
                # What became of it inside does not matter: the application took it for a success.
                context.error = context.answered = None
                await self.respond_to_failure(context.failure, scope, receive, context.forward)
        except BaseException as error:
            await abandon(context, error, has_answered=context.start is not None)
            raise
        else:
            if not context.end_at_once():
                await finish(context, commit=context.succeeded(), before_commit=self.before_commit)
        finally:
            context.forget()

    async def respond_to_failure(
        self, failure: Exception, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request whose commit failed with `failure`. This class raises it."""
        raise failure
