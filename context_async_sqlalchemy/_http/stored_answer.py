"""The answer to a request with an idempotency key, held until it is stored with what was done."""

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from context_async_sqlalchemy._engine.read_only import is_read_only
from context_async_sqlalchemy._engine.release import connections_of
from context_async_sqlalchemy._http.idempotency_keys import Keys, Names
from context_async_sqlalchemy._http.messages import is_streamed
from context_async_sqlalchemy._http.send import RequestContext
from context_async_sqlalchemy._unit.notes import name_of
from context_async_sqlalchemy._unit.settle import settle
from context_async_sqlalchemy.asgi_types import Message, Send


class StoredAnswer:
    """The answer to a request whose key was inserted in the transaction that is open now."""

    def __init__(
        self,
        context: RequestContext,
        session: AsyncSession,
        send: Send,
        keys: Keys,
        names: Names,
        body_limit: int,
    ) -> None:
        self._context = context
        self._session = session
        self._send = send
        self._keys = keys
        self._names = names
        self._body_limit = body_limit
        self._transaction = session.sync_session.get_transaction()
        self._start: Message | None = None
        self._body = bytearray()
        self._is_stored = False
        self._is_passed_on = False  # as it is not committed
        event.listen(session.sync_session, "before_commit", self._refuse_commit)

    async def send(self, message: Message) -> None:
        """Send a message of the response: all of them when the answer is stored."""
        try:
            ready = await self._hold(message)
        except Exception as error:
            # Like a COMMIT that fails: the application's exception handlers answer.
            self._context.failure = error
            await settle(self._context, commit=False)
            raise
        for each in ready:
            await self._send(each)

    def forget(self) -> None:
        """Let the session go, unless it could still commit the key without an answer."""
        if self._is_stored or not self._is_open():
            event.remove(self._session.sync_session, "before_commit", self._refuse_commit)

    async def _hold(self, message: Message) -> list[Message]:
        """Hold a message of the response; return what may be sent now."""
        if message["type"] == "http.response.start":
            self._start, self._body = None, bytearray()
            if not self._context.asks_for_commit(message["status"]) or self._context.rolls_back:
                self._is_passed_on = True
                return [message]
            if is_streamed(message) or message.get("trailers", False):
                raise RuntimeError(_STREAMED)
            self._start = message
            return []
        is_file = message["type"] in ("http.response.pathsend", "http.response.zerocopysend")
        if self._start is None or not (is_file or message["type"] == "http.response.body"):
            return [message]
        self._body += message.get("body", b"")
        if is_file or len(self._body) > self._body_limit:
            raise RuntimeError(_TOO_LARGE.format(self._body_limit))
        if message.get("more_body", False):
            return []
        return await self._store(self._start, bytes(self._body))

    async def _store(self, start: Message, body: bytes) -> list[Message]:
        if self._context.settles_late:
            raise RuntimeError(_LATE)
        open_ones = [s for s in self._context.in_transaction() if not is_read_only(s)]
        if len(open_ones) > 1 or len(connections_of(self._session)) > 1:
            raise RuntimeError(_SEVERAL.format(", ".join(map(name_of, open_ones))))
        if not await self._keys.answer(self._session, self._names, start, body):
            raise RuntimeError(_ENDED)
        self._start, self._is_stored = None, True
        return [start, {"type": "http.response.body", "body": body}]

    def _is_open(self) -> bool:
        return self._session.sync_session.get_transaction() is self._transaction

    def _refuse_commit(self, session: Session) -> None:
        if self._is_stored or session.in_nested_transaction():
            return
        if self._is_open() or not self._is_passed_on:
            raise RuntimeError(_EARLY)


_REFUSED = "The answer to a request with an Idempotency-Key cannot be stored: "
_STREAMED = _REFUSED + "it is streamed (it has no content-length). Return the whole of it."
_TOO_LARGE = _REFUSED + "it is larger than body_limit, which is {} bytes, or is sent as a file."
_LATE = _REFUSED + "commit_after_response() commits when it was sent. Do not call it."
_ENDED = _REFUSED + (
    "the application has ended the transaction of the request, as by rollback_db_session. Leave "
    "that to the middleware, or undo a savepoint."
)
_SEVERAL = _REFUSED + (
    "several databases have an open transaction ({}), which no COMMIT ends together. Write to the "
    "one that has the keys, and read from the others with read_only=True."
)
_EARLY = (
    "A request with an Idempotency-Key is committed together with its answer, and something "
    "commits it before: commit_db_session, a block of atomic_db_session that is no 'savepoint', or "
    "a response that is streamed (it has no content-length)."
)
