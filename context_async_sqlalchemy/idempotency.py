"""Idempotency keys: a request that is sent again is done once, and answered as the first time."""

import hashlib
import json
import re
from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError

from context_async_sqlalchemy._engine.border import real_session
from context_async_sqlalchemy._engine.driver_errors import TransientKind, transient_kind
from context_async_sqlalchemy._http.idempotency_keys import (
    Keys,
    Names,
    delete_expired_keys,
    idempotency_table,
)
from context_async_sqlalchemy._http.options import checked_methods, is_async
from context_async_sqlalchemy._http.same_request import has_context
from context_async_sqlalchemy._http.send import SCOPE_KEY, RequestContext
from context_async_sqlalchemy._http.stored_answer import StoredAnswer
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.session import db_session

__all__ = ["IdempotencyMiddleware", "delete_expired_keys", "idempotency_table"]


class IdempotencyMiddleware:
    """Do a request that has an `Idempotency-Key` once, and answer it alike each time it is sent.

    It belongs inside of the middleware that commits, which is added after it:

        app.add_middleware(IdempotencyMiddleware, connect=connect, table=keys, caller=user_of)
        add_fastapi_http_db_session_middleware(app)

    The key is inserted before the application is called, and its answer (status, headers and body)
    stored with it before the commit, in the transaction of the request. If that is rolled back, as
    with a status of 400 or more, there is no key. A request whose key there is already waits for
    the other one, and gets its answer, with the header `Idempotency-Replayed: true`.

    The answer is 400 if the key is missing or malformed, 409 with `Retry-After` if the other
    request takes too long, 413 if the body is too large, and 422 if the key came with another
    request. What cannot be stored together with its answer is rolled back, with a `RuntimeError`: a
    streamed response, an early commit, `commit_after_response`, a second database.

    Args:
        app: The ASGI application.
        connect: The database in which the application writes.
        table: What `idempotency_table` has returned.
        caller: A function of the ASGI scope that returns whose key it is, such as the name of the
            user. Nobody gets an answer that was another one's.
        methods: The methods with which a key counts. Default: POST and PATCH.
        required: Whether a request with these methods has to have one. Default False.
        expires_after: After how many seconds `delete_expired_keys` deletes a key. Default: a day.
        lock_timeout: How many seconds to wait for another request with the same key. It holds on
            PostgreSQL; elsewhere the database's own does. Default 5.
        body_limit: How many bytes the body of a request with a key, and that of its answer, may
            have. Default 1 MiB.

    Raises:
        TypeError: If `caller` is not a plain function, or `methods` are not a set of methods.
        ValueError: If a number of seconds is not above 0, or `body_limit` is less than 0.
    """

    def __init__(
        self,
        app: ASGIApp,
        connect: DBConnect[Any],
        table: Table,
        *,
        caller: Callable[[Scope], str],
        methods: Collection[str] = frozenset({"POST", "PATCH"}),
        required: bool = False,
        expires_after: float = 24 * 60 * 60,
        lock_timeout: float = 5.0,
        body_limit: int = 1024 * 1024,
    ) -> None:
        if not callable(caller) or is_async(caller):
            raise TypeError("caller must be a function, not an async one, that takes the scope")
        for name, seconds in ("expires_after", expires_after), ("lock_timeout", lock_timeout):
            if not seconds > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {seconds}")
        if body_limit < 0:
            raise ValueError(f"body_limit must be at least 0, not {body_limit}")
        self.app = app
        self._connect = connect
        self._keys = Keys(table, expires_after, lock_timeout)
        self._caller = caller
        self._methods = checked_methods(methods)
        self._required = required
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in self._methods:
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"idempotency-key"]
        context: RequestContext | None = scope.get(SCOPE_KEY)
        if (not given and not self._required) or (context is None and has_context(scope)):
            await self.app(scope, receive, send)  # which may be in the context of a test
            return
        if context is None or context.closed:
            raise RuntimeError(_OUTSIDE)
        key = _KEY.fullmatch(given[0]) if len(given) == 1 else None
        if key is None:
            await _refuse(send, 400, _MALFORMED if given else _MISSING)
            return
        body = await _body_of(receive, self._body_limit)
        if body is None:
            return  # the client has left
        if len(body) > self._body_limit:
            await _refuse(send, 413, f"The body is larger than {self._body_limit} bytes.")
            return
        names = Names(self._id_of(scope, key[1] or key[2]), _fingerprint_of(scope, body))
        session = real_session(await db_session(self._connect))
        was_open = session.in_transaction()
        try:
            is_first = await self._keys.claim(session, names)
        except DBAPIError as error:
            if transient_kind(error) is not TransientKind.CONFLICT:
                raise
            # From within `except`: with `attempts`, the middleware around this tries again.
            await _refuse(send, 409, _IN_PROGRESS)
            return
        if is_first:
            answer = StoredAnswer(context, session, send, self._keys, names, self._body_limit)
            try:
                await self.app(scope, _giving(body, receive), answer.send)
            finally:
                answer.forget()
            return
        stored = await self._keys.find(session, names)
        if not was_open:
            await session.rollback()  # what a commit calls, it has called for the first one
        await _answer_again(send, stored, names)

    def _id_of(self, scope: Scope, key: bytes) -> str:
        caller = self._caller(scope)
        if not isinstance(caller, str):
            raise TypeError(f"caller must return a str, not {type(caller).__name__}")
        return _digest(caller.encode("utf-8", "surrogatepass"), key)


async def _answer_again(send: Send, stored: Any, names: Names) -> None:
    if stored is None:  # deleted just now, or not to be seen in a transaction that had begun before
        await _refuse(send, 409, _IN_PROGRESS)
    elif stored.fingerprint != names.fingerprint:
        await _refuse(send, 422, _OTHER_REQUEST)
    elif stored.status is None:
        raise RuntimeError(_WITHOUT_ANSWER)
    else:
        headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in stored.headers]
        headers.append((b"idempotency-replayed", b"true"))
        await _respond(send, stored.status, headers, stored.body)


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 409:
        headers.append((b"retry-after", b"1"))
    await _respond(send, status, headers, body)


async def _respond(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body_of(receive: Receive, limit: int) -> bytes | None:
    """Return a body, or as much of it as is above the limit; None if its client has left."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _giving(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_next() -> Message:
        return messages.pop() if messages else await receive()

    return receive_next


def _fingerprint_of(scope: Scope, body: bytes) -> str:
    path = scope["path"].encode("utf-8", "surrogatepass")
    return _digest(scope["method"].encode(), path, scope.get("query_string", b""), body)


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(b"%d:%b" % (len(part), part))
    return sha.hexdigest()


# https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/ has a string in
# quotes; most clients leave the quotes away.
_KEY = re.compile(rb'"([ !#-\[\]-~]{1,255})"|([!#-\[\]-~]{1,255})')

_MISSING = "This request needs the header Idempotency-Key."
_MALFORMED = "Idempotency-Key must be given once, with 1 to 255 visible ASCII characters."
_IN_PROGRESS = "A request with this Idempotency-Key is in progress. Send it again later."
_OTHER_REQUEST = (
    "This Idempotency-Key came with another request. Send this one with a key of its own."
)
_OUTSIDE = (
    "IdempotencyMiddleware is not inside of the middleware that commits: add it first, and "
    "add_fastapi_http_db_session_middleware(app) after it, which is then around it."
)
_WITHOUT_ANSWER = (
    "An Idempotency-Key is stored without an answer: its request was committed by other means than "
    "its session, such as a COMMIT as text, or IdempotencyMiddleware is there twice. Find out what "
    "was done, and delete the row."
)
