"""A request is given to the application again after a transient error."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from functools import partial
from typing import TYPE_CHECKING

from context_async_sqlalchemy._http.messages import ends_body
from context_async_sqlalchemy._http.send import SCOPE_KEY, RequestContext
from context_async_sqlalchemy._unit.notes import note_once
from context_async_sqlalchemy._unit.on_commit import watch_commits
from context_async_sqlalchemy._unit.retry import Retrying, may_be_repeated
from context_async_sqlalchemy._unit.settle import settle
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from context_async_sqlalchemy._http.middleware import ASGIHTTPDBSessionMiddleware

TO_TELL = "context_async_sqlalchemy.to_tell"
"""Where a scope has what to do when the answer to the attempt is sent, which it may never be."""

ATTEMPT = "context_async_sqlalchemy.attempt"
"""In a scope that is given to the application again: for which time, 2 at first."""

_ENDS_THE_TASK = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


class Replay:
    """Lets a middleware serve a request until an attempt does not fail, or may not be repeated."""

    def __init__(
        self, middleware: ASGIHTTPDBSessionMiddleware, attempts: int, body_limit: int
    ) -> None:
        self._middleware = middleware
        self._retrying = Retrying(attempts)
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        middleware = self._middleware
        to_tell: list[Callable[[], None]] = []
        scope[TO_TELL] = to_tell  # a new attempt restores it as it was: empty
        request = _ReplayableRequest(scope, receive, self._body_limit)
        attempt = _Attempt(middleware.app, send)
        try:
            await self._try(attempt, request, scope)
        except Exception:
            if attempt.failure is None or attempt.sent:
                raise
            if attempt.held:
                for message in attempt.held:
                    await attempt.send(message)
            else:
                respond = partial(middleware.respond_to_failure, attempt.failure)
                await middleware._serve(respond, scope, receive, attempt.send)
        finally:
            if attempt.sent:
                for tell in to_tell:
                    tell()
            await request.close()

    async def _try(self, attempt: _Attempt, request: _ReplayableRequest, scope: Scope) -> None:
        middleware = self._middleware
        failure: Exception | None = None
        outer = sys.exception()  # being handled by the code that calls this application

        def is_repeatable(error: Exception) -> bool:
            nonlocal failure
            if error is outer or not attempt.may_be_repeated(error):
                return False
            if request.obstacle is not None:
                note_once(error, f"Not tried again: {request.obstacle}.")
                return False
            failure = error
            return True

        async for trial in self._retrying(is_repeatable, type(middleware).__name__):
            with trial:
                if failure is not None:
                    if await request.has_obstacle():
                        raise failure
                    request.rewind()
                    scope[ATTEMPT] = trial.num
                is_last = trial.num == self._retrying.attempts
                attempt.begin(None if is_last else is_repeatable)
                with suppress(_NotAnswered):
                    await middleware._serve(attempt, scope, request.receive, attempt.send)
                if attempt.failure is not None and not attempt.sent:
                    raise attempt.failure


class _Attempt:
    """The application, in one attempt after another to answer a request.

    The answer to a transient error is held: it is sent only if the request is not tried again.
    """

    def __init__(self, app: ASGIApp, send: Send) -> None:
        self.sent = False
        self.failure: Exception | None = None  # transient, and because of it nothing was sent
        self.held: list[Message] = []  # the answer to it, if the application has one
        self._app = app
        self._send = send
        self._is_repeatable: Callable[[Exception], bool] | None = None
        self._context: RequestContext | None = None
        self._is_refused = False  # the commit has failed, with an error that is not repeated

    def begin(self, is_repeatable: Callable[[Exception], bool] | None) -> None:
        """Begin another attempt; `is_repeatable` is None in the last one."""
        self.failure = None
        self.held = []
        self._is_repeatable = is_repeatable

    async def __call__(self, scope: Scope, receive: Receive, _: Send) -> None:
        self._context = context = scope[SCOPE_KEY]
        watch_commits(context)
        try:
            await self._app(scope, receive, self._answer)
        except BaseException as error:
            self._look_at_commit(context)
            is_answer = self.held and not isinstance(error, _ENDS_THE_TASK)
            if self.failure is None or self.sent or not (is_answer or isinstance(error, Exception)):
                raise
        else:
            self._look_at_commit(context)
        if self.failure is not None and not self.sent:
            raise _NotAnswered  # which rolls back

    def _look_at_commit(self, context: RequestContext) -> None:
        error = context.failure
        if error is not None and self._is_repeatable is not None and self.failure is None:
            if not self.sent and self._is_repeatable(error):
                self.failure = error
            else:
                self._is_refused = True

    async def send(self, message: Message) -> None:
        """Pass on a message to the server."""
        # Starlette's TestClient asks for the other one, which nobody sends to a client.
        self.sent = self.sent or message["type"] != "http.response.debug"
        await self._send(message)

    def may_be_repeated(self, error: Exception) -> bool:
        """Return whether the work of this attempt, which failed with `error`, may be done again."""
        context = None if self.sent or self._is_refused else self._context
        return context is not None and may_be_repeated(error, context)

    async def _answer(self, message: Message) -> None:
        if self.held:
            self.held.append(message)
            if ends_body(message):
                # Not an Exception, which the application might catch: it must not go on after an
                # answer that is not sent.
                raise _NotAnswered
            return
        context = self._context
        assert context is not None
        if self._is_repeatable is not None and message["type"] == "http.response.start":
            answered = context.handled_error()
            if (
                isinstance(answered, Exception)
                and not context.asks_for_commit(message["status"])
                and self._is_repeatable(answered)
            ):
                self.failure = answered
                self.held.append(message)
                # No connection is held while the rest of it is made.
                await settle(context, commit=False)
                return
        await context.forward(message)


class _NotAnswered(BaseException):
    """Ends an attempt whose answer is not sent."""


class _ReplayableRequest:
    """A request that keeps its scope and its body, to begin again with."""

    def __init__(self, scope: Scope, receive: Receive, body_limit: int) -> None:
        self.obstacle: str | None = None  # why it cannot be given to the application again
        self._scope = scope
        self._items = dict(scope)
        self._contents = {k: copy(v) for k, v in scope.items() if isinstance(v, dict | list)}
        self._receive = receive
        self._body_limit = body_limit
        # Joined: a client may send it in a million messages, each of which costs 200 bytes.
        self._body = bytearray()
        self._is_complete = False
        self._begins_again = False  # with what is kept of the body
        self._receiving: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        """Return the next message; after `rewind`, what is kept of the body comes first, as one."""
        if not self._begins_again:
            return await self._receive_next()
        self._begins_again = False
        more = not self._is_complete
        return {"type": "http.request", "body": bytes(self._body), "more_body": more}

    async def has_obstacle(self) -> bool:
        """Return whether there is an obstacle; look first whether the client has left."""
        while self.obstacle is None:
            was_complete = self._is_complete
            if self._receiving is None:
                self._receiving = asyncio.ensure_future(self._receive())
            # It is not cancelled: a chunk of the body, which it is about to return, would be lost.
            await asyncio.wait([self._receiving], timeout=_MOMENT)
            if not self._receiving.done():
                break
            try:
                await self._receive_next()
            except Exception as error:
                self.obstacle = f"its body cannot be read ({type(error).__name__})"
            if was_complete:  # and yet the server has more to say: it is no disconnect
                break
        return self.obstacle is not None

    def rewind(self) -> None:
        """Let the application begin again, with the scope and the body as they came."""
        self._begins_again = self._is_complete or bool(self._body)
        # In place: an outer middleware may hold the scope, or the state in it, and look there for
        # what the application has put.
        self._scope.clear()
        self._scope.update(self._items)
        for key, content in self._contents.items():
            value = self._scope[key]
            value.clear()
            (value.update if isinstance(content, dict) else value.extend)(content)

    async def close(self) -> None:
        """Leave no task."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])

    async def _receive_next(self) -> Message:
        try:
            message = await self._next_message()
        except asyncio.CancelledError:
            if not self._is_complete:
                self.obstacle = "the application has cancelled the reading of its body"
            raise
        if message["type"] == "http.disconnect":
            self.obstacle = "the client has left"
        elif message["type"] == "http.request" and not self._is_complete:
            self._is_complete = not message.get("more_body", False)
            if self.obstacle is None:
                self._keep(message.get("body", b""))
        return message

    def _keep(self, part: bytes) -> None:
        if len(self._body) + len(part) > self._body_limit:
            self.obstacle = f"its body is larger than {self._body_limit} bytes"
            self._body.clear()
        else:
            self._body += part

    async def _next_message(self) -> Message:
        # Two tasks may wait: one reads the body, another one watches whether the client leaves.
        while (receiving := self._receiving) is not None:
            await asyncio.wait([receiving])
            if self._receiving is receiving:
                self._receiving = None
                return receiving.result()
        return await self._receive()


_MOMENT = 0.001
"""How many seconds a server has to say that the client has left."""
