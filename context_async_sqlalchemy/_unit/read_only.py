"""Which session of a context is meant: the one that writes, or one that only reads."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal, TypeAlias, cast

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from context_async_sqlalchemy._engine.border import is_mocked
from context_async_sqlalchemy._engine.engines import Engines, SessionMaker
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.read_only import (
    READ_ONLY,
    Mode,
    has_one_connection,
    reading_engine,
    takes_what_it_is_given,
)
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy._unit.settle import AWAITED
from context_async_sqlalchemy._unit.single_flight import CREATE, SESSION_MAKER
from context_async_sqlalchemy.connect import DBConnect

ReadOnly: TypeAlias = bool | Literal["snapshot"] | None


async def chosen(
    context: DBSessionContext, connect: DBConnect[SessionT], read_only: ReadOnly
) -> DBConnect[SessionT]:
    """Return what makes the session that is asked for: `connect`, or one that makes readers of it.

    Where all sessions are on one connection, such as that of a test, there are no readers.
    """
    key = connect.context_key
    if read_only is None:
        read_only = key not in context.by_key and _only_reads(context)
    if read_only is False:
        return connect
    if read_only is not True and read_only != "snapshot":
        raise ValueError(f"read_only must be True, False or 'snapshot', not {read_only!r}")
    put = context.by_key.get(key)
    is_of_a_test = put is not None and not isinstance(getattr(put, "bind", None), AsyncEngine)
    if context.is_test or is_of_a_test or is_mocked(connect):
        return connect
    reader = reader_of(connect, read_only)
    if reader.context_key not in context.by_key and not reader.reading.is_known():
        if (engine := connect.engine) is None:
            await connect.session_maker()
            engine = connect.engine
        if engine is not None and has_one_connection(engine):
            return connect
    return cast("DBConnect[SessionT]", reader)


def key_of(context: DBSessionContext, connect: DBConnect[Any]) -> str:
    """Return the key of the session that `db_session(connect)` returns."""
    key = connect.context_key
    if key in context.by_key or not _only_reads(context) or is_mocked(connect):
        return key
    return reader_of(connect, True).context_key


def _only_reads(context: DBSessionContext) -> bool:
    methods = context.read_only_methods
    return bool(methods) and (request := context.request) is not None and request[0] in methods


def reader_of(connect: DBConnect[Any], mode: Mode) -> "_Reader":
    """Return what makes sessions of a connect that only read."""
    readers = connect._engines.readers
    key = connect.context_key, mode  # a `Replicated` has the engines of its primary
    reader: _Reader | None = readers.get(key)
    if reader is None:
        reader = readers[key] = _Reader(connect, mode)
    return reader


class _Reader(DBConnect[Any]):
    """A connect, as far as making a session asks for one, whose sessions only read."""

    def __init__(self, connect: DBConnect[Any], mode: Mode) -> None:
        self.context_key = f"{connect.context_key}, read-only: {mode}"
        self.leak_detection_threshold = connect.leak_detection_threshold
        self._connect = connect
        self._engines = self.reading = _Reading(connect, mode)
        if (handler := connect._before_create_session_handler) is not None:
            self._before_create_session_handler = lambda _: handler(connect)
        else:
            self._before_create_session_handler = None
        cls = type(connect)
        if (cls.create_session, cls.session_maker) != (CREATE, SESSION_MAKER):
            self.create_session = self._create_in_its_way  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return repr(self._connect)

    async def _create_in_its_way(self) -> AsyncSession:
        return self.reading.let_read(await self._connect.create_session())


class _Reading(Engines):
    """The engines of a connect, with a sessionmaker for sessions that only read."""

    def __init__(self, connect: DBConnect[Any], mode: Mode) -> None:
        self._connect, self._mode = connect, mode
        self._made = f"_context_async_sqlalchemy_{mode}"  # an attribute of a sessionmaker

    def is_known(self) -> bool:
        """Return whether the sessionmaker at hand has made such sessions before."""
        make = self._connect._engines.at_hand()
        return isinstance(make, async_sessionmaker) and self._made in vars(make)

    def at_hand(self) -> SessionMaker | None:
        make = self._connect._engines.at_hand()
        return self._reading(make) if make is not None else None

    async def session_maker_after(
        self, handler: Callable[[], Awaitable[None]] | None
    ) -> SessionMaker:
        return self._reading(await self._connect._engines.session_maker_after(handler))

    def let_read(self, session: AsyncSession) -> AsyncSession:
        """Let a session that was just made only read."""
        engine = reading_engine(session, self._connect, self._mode)
        if engine is not None:
            session.bind, session.sync_session.bind = engine, engine.sync_engine
            session.sync_session.twophase = False
            session.info.update(self._info(engine))
        return session

    def _reading(self, make: SessionMaker) -> SessionMaker:
        if type(make) is not async_sessionmaker:
            return cast("SessionMaker", lambda: self.let_read(make()))
        reading: SessionMaker | None = vars(make).get(self._made)
        if reading is None:
            session = make()
            engine = reading_engine(session, self._connect, self._mode)
            if engine is None:
                return make
            if takes_what_it_is_given(session):
                options: dict[str, Any] = {"bind": engine, "info": self._info(engine)}
                options["twophase"] = False  # there is nothing to prepare
                reading = cast("SessionMaker", partial(make, **options))
            else:
                reading = cast("SessionMaker", lambda: self.let_read(make()))
            vars(make)[self._made] = reading
        return reading

    def _info(self, engine: AsyncEngine) -> dict[str, Any]:
        # Drivers but asyncpg wait for something where the connection is set back.
        waits = {AWAITED: True} if engine.driver != "asyncpg" else {}
        return {READ_ONLY: self._mode, **waits}
