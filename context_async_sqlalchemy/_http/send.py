"""The context of a request, whose `send` settles it before the response starts."""

import sys
from asyncio import get_running_loop, sleep
from collections.abc import Awaitable, Callable

from context_async_sqlalchemy._http.messages import Streamed, ends_response, has_no_body
from context_async_sqlalchemy._unit.context import DBSessionContext, _context
from context_async_sqlalchemy._unit.hidden import send_hidden
from context_async_sqlalchemy._unit.lost_work import tell_of_cut_off_body, tell_of_lost_work
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback, is_success, settle
from context_async_sqlalchemy.asgi_types import Message, Receive, Scope, Send

SCOPE_KEY = "context_async_sqlalchemy"
"""In the scope of a request: its `RequestContext`, until it ends."""

COMMITS = "context_async_sqlalchemy.commits"
"""In the scope, or a copy, of a request with limits: a list of what has begun to commit."""

STOPPED = "stopped"
"""In that list, if the request is about to be cancelled."""


class RequestContext(DBSessionContext):
    """The context of a request, made in the event loop that serves it."""

    def __init__(
        self,
        scope: Scope,
        layer: object,
        receive: Receive,
        send: Send,
        before_commit: BeforeCommitCallback | None,
        commit_on: Callable[[int], bool],
    ) -> None:
        super().__init__()
        self.loop = get_running_loop()
        self.scope = scope
        self.app = scope.get("app")  # in which it was opened, if it is Starlette's
        self.passed: tuple[object, ...] = (layer,)  # have seen the request; the first opened this
        self._receive = receive
        self.send = send
        self.before_commit = before_commit
        self.commit_on = commit_on
        self.start: Message | None = None  # of the response, when it is on its way
        self.streamed: Streamed | None = None  # its body, if it comes in parts
        self.completed = False  # the last part of the body was sent
        self.commit = False  # what the status of the response asks for
        self.failure: Exception | None = None  # kept a response from starting
        self.answered: BaseException | None = None  # what was handled while the answer was made
        self.error: Exception | None = None  # with which the body has ended
        self.is_cut_off = False  # the body has ended before its last part
        self.outer: tuple[BaseException | None, ...] = (sys.exception(),)  # the caller's affair
        self.handed_over: int | None = None  # the status, by the application itself
        self.was_settled = False  # before its body, so that what is open now is the body's

    @property
    def request(self) -> tuple[str, str]:  # type: ignore[override]
        """Its method and path."""
        return self.scope.get("method", ""), self.scope.get("path", "")

    def open(self) -> None:
        """Make it the context of the request."""
        self.scope[SCOPE_KEY] = self
        self.token = _context.set(self)

    def forget(self) -> None:
        """Let nothing refer to it that it refers to, when it has ended."""
        if self.scope.get(SCOPE_KEY) is self:
            del self.scope[SCOPE_KEY]
        self.error = self.answered = None

    def note_commit(self) -> bool:
        noted = self.scope.get(COMMITS, [])
        noted.append(self)
        return STOPPED in noted

    async def receive(self) -> Message:
        """Receive a message: a server that goes on reading then does so from here, for good."""
        token = _context.set(None)
        try:
            return await self._receive()
        finally:
            _context.reset(token)

    # Neither `__call__`, which is slower, nor a coroutine, which most messages do not need.
    def forward(self, message: Message) -> Awaitable[None]:
        """Send a message to the server."""
        if message["type"] == "http.response.start":
            if self.held or self.commits is not None or self.error is not None:
                return self._settle_and_start(message)
            self.commit = self.asks_for_commit(message["status"])
            self.start, self.answered, self.outer = message, None, ()
        elif self.start is not None:
            if not ends_response(self.start, message):
                self.streamed = self.streamed or Streamed(self.start)
                return sleep(0) if self.streamed.keeps(message) else self.send(message)
            is_settled = self.settles_late or self.is_settled()
            if not is_settled or self.error is not None or self.is_cut_off or self.streamed:
                return self._settle_and_end(message)
            self.completed = True
            return send_hidden(self.send, message)
        return self.send(message)

    async def _settle_and_start(self, message: Message) -> None:
        if (settling := self.settle_by(message)) is not None:
            await settling
        # The tracebacks of the others refer to this object.
        self.start, self.answered, self.outer = message, None, ()
        await self.send(message)

    async def _settle_and_end(self, message: Message) -> None:
        if self.error is not None:
            raise self.error  # which another middleware has kept to itself
        if not self.is_cut_off:
            if not self.settles_late and not self.is_settled():
                # A client that has the whole body must be able to rely on what it says.
                await settle(self, commit=True, before_commit=self.before_commit)
            self.completed = True
        for each in (*(self.streamed.kept if self.streamed else ()), message):
            await send_hidden(self.send, each)

    def settle_by(self, start: Message) -> Awaitable[None] | None:
        """Return what settles, by the start of the response, what is open and not the body's."""
        status = start["status"]
        if self.error is not None and (sys.exception() is self.error or status >= 400):
            # Another middleware answers it, and what the body has begun is of no use.
            self.error, self.was_settled = None, False
        if self.error is not None and (not self.was_settled or has_no_body(start)):
            raise self.error  # nothing is committed, or a body that is cut off would not tell
        self.commit = self.asks_for_commit(status)
        if self.commit:
            self.note_commit()
        if self.is_settled() or (self.was_settled and (self.commit or status == self.handed_over)):
            return None
        if not self.commit or self.rolls_back:
            tell_of_lost_work(self, status)
        return self._settle() if not self.settles_late else None

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
        return error if error not in self.outer else None

    def succeeded(self) -> bool:
        """Return whether to commit what is open when the application has returned."""
        if self.start is not None and not self.completed and self.in_transaction():
            tell_of_cut_off_body()
        return self.completed and (self.commit or not self.settles_late)

    async def _settle(self) -> None:
        try:
            await settle(self, commit=self.commit, before_commit=self.before_commit)
        except Exception as error:
            self.failure = error
            raise
