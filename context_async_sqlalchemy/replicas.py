"""A primary and its replica as one database: each context decides once which of them it uses."""

import asyncio
import inspect
from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, proxy

from sqlalchemy import Executable, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from context_async_sqlalchemy._engine.options import SessionT_co
from context_async_sqlalchemy._engine.read_only import INSTEAD, TRANSACTIONS, copy_of
from context_async_sqlalchemy._engine.standby import Standby, Times, ask
from context_async_sqlalchemy._http.position_cookie import UNKNOWN, PositionCookie
from context_async_sqlalchemy._http.replay import ATTEMPT
from context_async_sqlalchemy._http.send import RequestContext
from context_async_sqlalchemy._unit.context import DBSessionContext, contexts_here
from context_async_sqlalchemy.asgi_types import Message, Send
from context_async_sqlalchemy.connect import DBConnect

_READING = {"GET", "HEAD"}
_INSERTED = text("SELECT pg_current_wal_insert_lsn() - CAST('0/0' AS pg_lsn)")
_COPY = "_context_async_sqlalchemy_reads"
_INSTEAD = (
    "Use 'with on_primary():' before the first session of the request, or another method than GET "
    "and HEAD; outside of a request, leave out on_replica()."
)


@contextmanager
def on_primary() -> Generator[None]:
    """Let the context here, and those opened in the block, use the primary, whatever the method.

        with on_primary():
            session = await db_session(database)

    Raises:
        InvalidRequestError: If the context has a session of a replica already.
    """
    context = next(contexts_here(), None)
    if context is not None and not context.closed:
        choice = _choices.setdefault(context, _Choice())
        if choice.writes is False:
            raise InvalidRequestError(
                f"{_name(context)} has begun to read from the replica, and each context decides "
                "once: enter on_primary() before its first session. A block of its own, such as "
                "'async with new_db_session_ctx():', uses the primary."
            )
        choice.writes = True
    with _in_block(writes=True):
        yield


@contextmanager
def on_replica() -> Generator[None]:
    """Let contexts that ask for their first session in the block read from the replica.

    For what is no GET or HEAD, such as a report in a task:

        with on_replica():
            report = await run_in_new_ctx(load_report)
    """
    with _in_block(writes=False):
        yield


class Replicated(DBConnect[SessionT_co]):
    """A primary and its replica, PostgreSQL, in the place of a connect.

        database = Replicated(primary, replica, secret=SECRET)

    Each context decides with its first session where all of its statements go. A request with GET
    or HEAD reads from the replica; anything else uses the primary. `on_primary` and `on_replica`
    decide otherwise. Whoever reads may not write, on either server: `InvalidRequestError`.

    A response to whoever may have written has a signed cookie with the position of the log. A later
    request with it waits, for a while, until the replica has replayed up to there. If it has not,
    or does not answer, or if the request is a further attempt (`attempts`), the primary is read.

    What is not about sessions (`engine`, `host`, `ping` and so on) is the primary's; `close` closes
    both. The replica's connect leads to one server at a time.

    Args:
        primary: The connect of the primary.
        replica: The connect of the replica.
        secret: Signs the cookie: the same for all processes, at least 16 characters.
        fallback: Reads where no replica does, with a pool of its own. Default None: `primary`.
        patience: The seconds that a replica has to replay what a client has written. Default 1.
        timeout: The seconds that a server has to answer. Default 2.
        check_after: The seconds for which a replica that has answered is not asked. Default 1.
        retry_after: The seconds for which one that has not is not asked again. Default 5.
        cookie: The name of the cookie; for each database its own. Default "db_position".
        max_age: The seconds for which the cookie counts: more than a replica lags. Default 60.
        secure: Whether browsers send the cookie over HTTPS only. Default True.

    Raises:
        TypeError: If `primary` or `replica` is no `DBConnect`.
        ValueError: If `secret` is too short.
    """

    def __init__(
        self,
        primary: DBConnect[SessionT_co],
        replica: DBConnect[SessionT_co],
        *,
        secret: str | bytes,
        fallback: DBConnect[SessionT_co] | None = None,
        patience: float = 1.0,
        timeout: float = 2.0,
        check_after: float = 1.0,
        retry_after: float = 5.0,
        cookie: str = "db_position",
        max_age: int = 60,
        secure: bool = True,
    ) -> None:
        if not (isinstance(primary, DBConnect) and isinstance(replica, DBConnect)):
            raise TypeError("primary and replica must be DBConnect objects")
        if len(secret) < 16:
            raise ValueError("secret must have at least 16 characters, and be nobody else's")
        key = secret.encode() if isinstance(secret, str) else secret
        self._cookie = PositionCookie(key, cookie, max_age, secure)
        self._times = Times(patience, timeout, check_after, retry_after)
        self._primary, self._replica, self._fallback = primary, replica, fallback or primary
        self.context_key = f"{primary.context_key} and {replica.context_key}"
        self.leak_detection_threshold = primary.leak_detection_threshold
        self._engines = primary._engines
        self._before_create_session_handler = None  # those of the connects run

    def __copy__(self, _: object = None) -> NoReturn:
        raise TypeError("a Replicated cannot be copied: make another one, of copied connects")

    __deepcopy__ = __copy__

    def __repr__(self) -> str:
        return f"<Replicated primary={self._primary!r} replica={self._replica!r}>"

    async def create_session(self) -> SessionT_co:
        """Make a session where the context here has decided, or else decides now."""
        context = next((c for c in contexts_here() if not c.closed), None)
        choice = _choices.setdefault(context, _Choice()) if context is not None else _Choice()
        if choice.writes is None:
            told = _told.get()
            method = context.request[0] if context is not None and context.request else ""
            choice.writes = told if told is not None else method not in _READING
        connect = choice.connects.get(self.context_key)
        if connect is None:
            connect = self._primary if choice.writes else await self._reader()
            # Another task of the context may have been faster, with `read_only`.
            connect = choice.connects.setdefault(self.context_key, connect)
        session: SessionT_co = await connect.create_session()
        if choice.writes:
            self._give_position()
        elif isinstance(session.bind, AsyncEngine):
            reading = _reading(session.bind)
            if connect is not self._replica or Standby.of(session.bind).is_promoted:
                session.bind, session.sync_session.bind = reading, reading.sync_engine
            elif INSTEAD not in session.bind.sync_engine.get_execution_options():
                session.bind.sync_engine.update_execution_options(**{INSTEAD: _INSTEAD})
        return session

    async def session_maker(self) -> async_sessionmaker[SessionT_co]:
        """Return the sessionmaker of the primary."""
        return await self._primary.session_maker()

    async def close(self) -> None:
        """Close the engines of every connect."""
        for connect in dict.fromkeys((self._fallback, self._replica, self._primary)):
            await connect.close()

    async def _execute(self, statement: Executable) -> None:
        await self._primary._execute(statement)

    async def _reader(self) -> DBConnect[SessionT_co]:
        """Return the connect from which a context reads."""
        if self._engines.is_pinned:
            return self._primary  # a test's transaction
        request, position = _request_here(), 0
        if request is not None:
            if request.scope.get(ATTEMPT, 1) > 1:
                return self._fallback
            position = self._cookie.position(request.scope["headers"])
        if position < UNKNOWN:
            await self._replica.session_maker()  # opens an engine, for the host that it chooses
            engine = self._replica.engine
            if engine and await Standby.of(engine).has_replayed(position, self._times):
                return self._replica
        return self._fallback

    def _give_position(self) -> None:
        """Let the response have a cookie with the position after what is committed until then."""
        request = _request_here()
        if request is None or request.start is not None or self._engines.is_pinned:
            return
        given = _choices.setdefault(request, _Choice()).given
        if self.context_key not in given:
            given.add(self.context_key)
            request.send = partial(self._send, proxy(request), request.send)  # no cycle

    async def _send(self, request: RequestContext, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start":
            request.send = send
            # A 5xx says nothing of what was written. A commit that is lost may still take place.
            is_known = message["status"] < 500 and not request.settles_late
            position = await self._position() if is_known else UNKNOWN
            headers = [*message.get("headers", ()), self._cookie.header(position)]
            message = {**message, "headers": headers}
        await send(message)

    async def _position(self) -> int:
        """Return the position after the commit; one read before it lies before its record."""
        if (engine := self._primary.engine) is None:
            return UNKNOWN
        try:
            async with asyncio.timeout(self._times.timeout):
                return int(await ask(engine, _INSERTED))
        except Exception as error:
            Standby.of(engine).tell("does not tell the position of a commit", error)
            return UNKNOWN


class _Choice:
    """What a context has decided."""

    def __init__(self) -> None:
        self.writes: bool | None = None
        self.connects: dict[str, DBConnect[Any]] = {}  # by the key of the `Replicated`
        self.given: set[str] = set()  # whose position its response has


_choices: WeakKeyDictionary[DBSessionContext, _Choice] = WeakKeyDictionary()
_told: ContextVar[bool | None] = ContextVar("writes", default=None)


@contextmanager
def _in_block(*, writes: bool) -> Generator[None]:
    token = _told.set(writes)
    try:
        yield
    finally:
        # A dependency that is no async function runs in threads, each half in its own `Context`.
        with suppress(ValueError):
            _told.reset(token)


def _request_here() -> RequestContext | None:
    request = next((c for c in contexts_here() if isinstance(c, RequestContext)), None)
    if request is None or request.closed:
        return None
    if inspect.isfunction(request.passed[0]):
        raise RuntimeError(
            "Replicated puts a cookie into the response, which a dispatch function for "
            "BaseHTTPMiddleware does not see: use add_fastapi_http_db_session_middleware(app), or "
            "add_starlette_http_db_session_middleware(app)"
        )
    return request


def _name(context: DBSessionContext | None) -> str:
    return context.name if context is not None and context.request else "A unit of work"


def _reading(engine: AsyncEngine) -> AsyncEngine:
    """Return a copy of an engine with READ ONLY transactions, whose errors say what to do."""
    if engine.dialect.name != "postgresql":
        return engine  # of a developer, who has no replica
    kept = vars(engine.sync_engine)
    copied: AsyncEngine | None = kept.get(_COPY)
    if copied is None:
        reading = copy_of(engine, TRANSACTIONS)
        copied = kept[_COPY] = reading.execution_options(**{INSTEAD: _INSTEAD})
        event.listen(copied.sync_engine, "handle_error", partial(_explain, engine))
    return copied


def _explain(engine: AsyncEngine, context: ExceptionContext) -> None:
    if context.is_disconnect:
        Standby.of(engine).doubt()
    options = context.connection.get_execution_options() if context.connection else {}
    # https://www.postgresql.org/docs/current/errcodes-appendix.html: read_only_sql_transaction
    if INSTEAD in options and getattr(context.original_exception, "sqlstate", "") == "25006":
        name = _name(next(contexts_here(), None))
        raise InvalidRequestError(
            f"{name} reads from the replica, and a statement writes or locks: "
            f"{(context.statement or '')[:200]}\n{_INSTEAD}"
        ) from context.original_exception
