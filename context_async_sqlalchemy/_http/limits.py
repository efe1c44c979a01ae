"""A request that takes too long is stopped, and one whose client has left, before its answer."""

import asyncio
from collections import deque
from collections.abc import Collection
from contextvars import ContextVar

from context_async_sqlalchemy._engine.driver_errors import was_canceled
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._http.options import checked_methods
from context_async_sqlalchemy._http.send import COMMITS, STOPPED
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send


class RequestLimitsMiddleware:
    """Stop a request that takes too long, or whose client has left: roll it back, and answer 504.

        add_fastapi_http_db_session_middleware(app)
        app.add_middleware(RequestLimitsMiddleware, timeout=10.0)

    Put it around the middleware that gives requests their context. The time is that of the whole
    request, up to the start of its response: waiting for a connection, every statement, every
    attempt. A commit that has begun is not interrupted, nor what comes after it: `on_commit`, the
    rest of the body, background tasks. A plain function runs in a thread, and cannot be stopped:
    its request is answered when it returns.

    A Starlette or FastAPI application answers as it answers an `HTTPException` with status 504.
    Who has left gets no answer; logs of the server show 499.

    Args:
        app: The ASGI application.
        timeout: The seconds that a request may take. Default None: no limit.
        cancel_on_disconnect: The methods of requests to stop when their client leaves, such as
            `{"GET", "HEAD"}`; a client that only stops sending has left, too. Default: none.

    Raises:
        TypeError: If `timeout` is no number, or `cancel_on_disconnect` no collection of methods.
        ValueError: If `timeout` is not more than 0.
    """

    def __init__(
        self,
        app: ASGIApp,
        timeout: float | None = None,
        cancel_on_disconnect: Collection[str] = frozenset(),
    ) -> None:
        self.app = app
        self._timeout = _checked(timeout)
        self._watched = checked_methods(cancel_on_disconnect, "cancel_on_disconnect")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(scope, send)
        client = _Client(receive, request) if scope["method"] in self._watched else None
        token = _here.set(request)
        try:
            request.set_deadline(self._timeout)
            await request.serve(self.app, receive if client is None else client.receive)
        finally:
            request.lift()
            _here.reset(token)
            if client is not None:
                await client.close()


def set_deadline(seconds: float | None) -> None:
    """Give the request here so many seconds from now, in the place of the middleware's `timeout`.

    For a route that may take longer, or shorter: call it first, in a coroutine. The
    `statement_timeout` of a transaction that has begun stays as it is (`deadline_settings`).

    Args:
        seconds: The seconds from now; None: no limit.

    Raises:
        RuntimeError: If there is no `RequestLimitsMiddleware` around the request.
        TypeError: If `seconds` is no number.
        ValueError: If `seconds` is not more than 0.
    """
    request = _here.get()
    if request is None:
        raise RuntimeError("set_deadline() needs a RequestLimitsMiddleware around the request")
    request.set_deadline(_checked(seconds))


def deadline_settings(backstop: float | None = None) -> dict[str, str | int]:
    """Return the `statement_timeout` of PostgreSQL with which a transaction of a request begins.

        connect = DBConnect.from_url(url, transaction_settings=deadline_settings)

    The server ends a statement a moment before the deadline of the request, and the connection
    stays usable; a process that hangs leaves no statement behind. Where there is no deadline, and
    from the commit on, as in `on_commit`, it is empty.

    Args:
        backstop: The seconds after the deadline when the server closes the connection, by its
            `transaction_timeout`, which is new in PostgreSQL 17. Default None: never.
    """
    request = _here.get()
    left = request.seconds_left() if request is not None else None
    if left is None:
        return {}
    settings: dict[str, str | int] = {"statement_timeout": _milliseconds(left - _MOMENT)}
    if backstop is not None:
        settings["transaction_timeout"] = _milliseconds(left + backstop)
    return settings


class _Request:
    """A request that can be stopped, until its response starts."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._commits: list[object] = []
        scope[COMMITS] = self._commits
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._block = asyncio.timeout(None)
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False
        self._has_ended = False
        self._status = 504
        self.is_answered = False

    async def serve(self, app: ASGIApp, receive: Receive) -> None:
        try:
            async with self._block:
                try:
                    await app(self._scope, receive, self._forward)
                finally:
                    self._has_ended = True  # and cannot be stopped any more
        except Exception as error:
            if self.is_answered or not (self._is_stopped or self._was_last_moment(error)):
                raise
            self.lift()
            await self._answer(receive)

    def set_deadline(self, seconds: float | None) -> None:
        if self.is_answered:
            return
        self.lift()
        if seconds is not None:
            self._deadline = self._loop.time() + seconds
            self._timer = self._loop.call_at(self._deadline, self.stop, 504)

    def seconds_left(self) -> float | None:
        if self._deadline is None or self.is_answered or self._commits:
            return None
        return self._deadline - self._loop.time()

    def lift(self) -> None:
        """Let there be no deadline."""
        self._deadline = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self, status: int) -> None:
        """Cancel what the application does, unless it has answered: what it did is committed."""
        if self.is_answered or self._is_stopped or self._has_ended:
            return
        if self._commits:
            # The commit may fail, and the request be tried again.
            self._timer = self._loop.call_later(_MOMENT, self.stop, status)
            return
        self._is_stopped, self._status = True, status
        self._commits.append(STOPPED)  # none begins before the next round of the loop, either
        self._block.reschedule(self._loop.time())

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_answered = True
            self.lift()
        await self._send(message)

    def _was_last_moment(self, error: Exception) -> bool:
        """Return whether the server has ended a statement because the deadline was near."""
        left = self.seconds_left()
        return left is not None and left < 2 * _MOMENT and was_canceled(error)

    async def _answer(self, receive: Receive) -> None:
        method, path = self._scope["method"], self._scope["path"]
        if self._status == _CLIENT_HAS_LEFT:
            logger.info("The client of %s %r has left: it was stopped", method, path)
        else:
            logger.warning("%s %r has reached its deadline: it was stopped", method, path)
            if "starlette.exception_handlers" in self._scope:
                from context_async_sqlalchemy._http.starlette import respond_with_status

                await respond_with_status(self._status, self._scope, receive, self._forward)
                return
        body = b"Gateway Timeout" if self._status == 504 else b""
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        start = {"type": "http.response.start", "status": self._status, "headers": headers}
        await self._forward(start)
        await self._forward({"type": "http.response.body", "body": body})


class _Client:
    """Receives for the application, one message ahead once the request is complete."""

    def __init__(self, receive: Receive, request: _Request) -> None:
        self._receive = receive
        self._request = request
        self._received: deque[Message | Exception] = deque()
        self._receiving: asyncio.Task[None] | None = None
        self._receive_next()

    async def receive(self) -> Message:
        """Return the next message."""
        while not self._received:
            # Several tasks may wait, and one that is cancelled must not take it from the others.
            await asyncio.wait([self._receiving or self._receive_next()])
        message = self._received.popleft()
        if isinstance(message, Exception):
            raise message
        return message

    async def close(self) -> None:
        """Leave no task."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])

    def _receive_next(self) -> asyncio.Task[None]:
        self._receiving = asyncio.create_task(self._keep_next())
        return self._receiving

    async def _keep_next(self) -> None:
        try:
            message = await self._receive()
        except Exception as error:
            self._receiving = None
            self._received.append(error)
            return
        self._receiving = None
        self._received.append(message)
        if message["type"] == "http.disconnect":
            self._request.stop(_CLIENT_HAS_LEFT)
        elif not (message.get("more_body", False) or self._request.is_answered):
            self._receive_next()


def _checked(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int | float):
        raise TypeError(f"a deadline must be a number of seconds, not {type(seconds).__name__}")
    if not seconds > 0:
        raise ValueError(f"a deadline must be more than 0 seconds, not {seconds}")
    return seconds


def _milliseconds(seconds: float) -> int:
    return max(int(seconds * 1000), 1)  # 0 means "no limit" to PostgreSQL


_here: ContextVar[_Request | None] = ContextVar("limited_request", default=None)

_MOMENT = 0.05
"""The seconds by which the server is to end a statement before the deadline."""

_CLIENT_HAS_LEFT = 499
"""Nobody receives it; nginx has made it the custom in logs."""
