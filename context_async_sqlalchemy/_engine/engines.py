"""The engines of a connect: one on each event loop, made when it is first needed."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from context_async_sqlalchemy._engine.checks import (
    check_callable,
    check_engine,
    check_host,
    check_session_maker,
)
from context_async_sqlalchemy._engine.created import ResultOf, result_of, without_waiting
from context_async_sqlalchemy._engine.guard import close_engine, finish_closing, guard
from context_async_sqlalchemy._engine.host import Host
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.loops import PerLoop
from context_async_sqlalchemy._engine.shield import keep, run_to_completion
from context_async_sqlalchemy._engine.transaction_settings import begin_without_settings

_MOMENT = 1.0  # seconds
SessionMaker: TypeAlias = async_sessionmaker[Any]


class Opened(NamedTuple):
    """An engine, its sessionmaker, and the host they talk to."""

    host: str | None
    engine: AsyncEngine
    session_maker: SessionMaker


class _Place:
    """The engine of an event loop."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # creators may wait, and must not be called twice
        self.opened: Opened | None = None


class Engines:
    """The engines of a connect."""

    def __init__(
        self,
        engine_creator: Callable[[str], Awaitable[AsyncEngine] | AsyncEngine],
        session_maker_creator: Callable[[AsyncEngine], Awaitable[SessionMaker] | SessionMaker],
        host: str | None,
    ) -> None:
        check_callable("engine_creator", engine_creator)
        check_callable("session_maker_creator", session_maker_creator)
        self.host = Host(host)
        self.needs_host = True  # to make an engine
        self.latest: Opened | None = None  # on any loop, until `close`
        self.put_by_hand: AsyncEngine | None = None  # closed with the others
        self.session_maker_put_by_hand: SessionMaker | None = None  # until an engine is made
        self._engine_creator = engine_creator
        self._session_maker_creator = session_maker_creator
        self._retiring: set[asyncio.Task[None]] = set()
        self._places = PerLoop(_Place)
        self._pinned: _Place | None = None
        self.readers: dict[Any, Any] = {}  # of its connect, by what they read
        self._close_unpinned = False

    def anew(self) -> "Engines":
        """Return what makes engines in the same way, and has made none."""
        engines = Engines(self._engine_creator, self._session_maker_creator, self.host.now)
        engines.needs_host = self.needs_host
        return engines

    async def session_maker_after(
        self, handler: Callable[[], Awaitable[None]] | None
    ) -> SessionMaker:
        """Run a handler, if there is one; return the sessionmaker for the host that it leaves."""
        chosen = await self.host.chosen_by(handler) if handler is not None else None
        return self.session_maker_put_by_hand or (await self.get(chosen)).session_maker

    def at_hand(self) -> SessionMaker | None:
        """Return the sessionmaker for the host if its engine is open here."""
        if self._pinned is not None or self.session_maker_put_by_hand is not None:
            return None
        opened = self._places.here().opened
        return opened.session_maker if opened and opened.host == self.host.now else None

    async def get(self, chosen: str | None = None) -> Opened:
        """Return the engine of the running loop for the host, made if there is none.

        If a handler has chosen a host, it is for that, even if the host is another by now.
        """
        place = self._places.here()
        if self._pinned is not None:
            return self._get_pinned(place)
        if (opened := place.opened) is not None and opened.host == (chosen or self.host.now):
            return opened
        async with place.lock:
            retiring: list[asyncio.Task[None]] = []
            host = chosen or self.host.now
            if (opened := place.opened) is None or opened.host != host:
                opened = await self._make(host)
                retiring = self._put(place, opened)
        await _wait_a_moment(retiring)
        return opened

    def get_now(self) -> SessionMaker:
        """Return the sessionmaker for the host, its engine made if there is none, without waiting.

        `WouldWaitError` if there is something to wait for.
        """
        place = self._places.here()
        if self.session_maker_put_by_hand is not None:
            return self.session_maker_put_by_hand
        if self._pinned is not None:
            return self._get_pinned(place).session_maker
        if (session_maker := self.at_hand()) is not None:
            return session_maker
        opened = without_waiting(partial(self._make, self.host.now))
        self._put(place, opened)
        return opened.session_maker

    def put(self, engine: AsyncEngine) -> None:
        """Put an engine here that somebody else made."""
        if engine is self.put_by_hand:
            return
        self.put_by_hand = None
        # A test that has patched it puts back what was there: its user is counted already.
        if engine is not self.here():
            guard(engine)
            self.put_by_hand = engine

    async def switch(self, host: str, *, anew: bool) -> None:
        """Talk to `host` from now on; with `anew`, with a new engine even if it is the host."""
        check_host(host)
        place = self._places.here()
        if self._pinned is not None or (host == self.host.now and not anew):
            self.host.set(host)
            return
        async with place.lock:
            retiring: list[asyncio.Task[None]] = []
            if anew or host != self.host.now:
                retiring = self._put(place, await self._make(host))
            self.host.set(host)
        await _wait_a_moment(retiring)

    async def close(self) -> None:
        """Close every engine, each on its own loop."""
        if self._pinned is not None:
            self._close_unpinned = True
            return
        place = self._places.here()
        async with place.lock:
            engines = [place.opened.engine] if place.opened is not None else []
            if self.put_by_hand is not None:
                engines.append(self.put_by_hand)
            place.opened = self.latest = self.put_by_hand = self.session_maker_put_by_hand = None
        for loop, other in self._places.elsewhere():
            with suppress(RuntimeError):  # it has been closed meanwhile
                loop.call_soon_threadsafe(self._close_place, other)
        await run_to_completion(self._close(engines))

    @asynccontextmanager
    async def pin(self) -> AsyncGenerator[Opened]:
        """Keep the engine of the running loop for a block, even if the host changes.

        A `close` in the block takes place at its end; `get` on another loop raises.
        """
        if self._pinned is not None:
            raise RuntimeError("a test's transaction is open already for this connect")
        opened = await self.get()
        self._pinned, self._close_unpinned = self._places.here(), False
        try:
            yield opened
        finally:
            self._pinned = None
            if self._close_unpinned:
                await self.close()

    @property
    def is_pinned(self) -> bool:
        """Whether the transaction of a test is open."""
        return self._pinned is not None

    def here(self) -> AsyncEngine | None:
        """Return the engine of the running loop, or the one opened last, or put here by hand."""
        if self._pinned is not None and self._pinned.opened is not None:
            return self._pinned.opened.engine  # on every loop: no test leaves its transaction
        opened = self.latest
        with suppress(RuntimeError):  # no loop is running
            opened = opened and (self._places.here().opened or opened)
        return opened.engine if opened is not None else self.put_by_hand

    @property
    def session_maker(self) -> SessionMaker | None:
        """What was put here by hand, or else the sessionmaker of the engine opened last."""
        made = self.latest.session_maker if self.latest is not None else None
        return self.session_maker_put_by_hand or made

    @session_maker.setter
    def session_maker(self, session_maker: SessionMaker | None) -> None:
        self.session_maker_put_by_hand = None
        # A test that has patched it puts back what was there, which belongs to its event loop.
        if session_maker is not self.session_maker:
            self.session_maker_put_by_hand = session_maker

    async def make_engine_for_caller(self, host: str | None) -> AsyncEngine:
        """Make an engine, but not if a test would have its work stored."""
        if self._pinned is not None:
            raise RuntimeError(
                "A test's transaction is open: what create_engine() makes would commit for real. "
                "Migrate before the transaction opens, or use connect.engine."
            )
        return await self.make_engine(host)

    async def make_engine(self, host: str | None) -> AsyncEngine:
        """Make an engine that belongs to the caller, without `transaction_settings`."""
        engine = await self._create(host)
        begin_without_settings(engine)
        return engine

    async def _create(self, host: str | None, result_of: ResultOf = result_of) -> AsyncEngine:
        if host is not None:
            check_host(host)
        elif self.needs_host:
            raise ValueError("host is not set")
        made = self._engine_creator(host)  # type: ignore[arg-type]  # None: the URL's
        return check_engine(await result_of(made))

    def _get_pinned(self, place: _Place) -> Opened:
        if place is not self._pinned or place.opened is None:
            raise RuntimeError(
                "The transaction of this test was opened on another event loop than the one on "
                "which a session is asked for. With pytest-asyncio, let the fixture have the loop "
                "of the test (asyncio_default_fixture_loop_scope). With Starlette's TestClient, "
                "use the fixture shared_client."
            )
        return place.opened

    def _close_place(self, place: _Place) -> None:
        # Whoever closes the connect on this loop meanwhile waits for it.
        if place.opened is not None:
            opened, place.opened = place.opened, None
            self._retire(opened.engine)

    async def _close(self, engines: list[AsyncEngine]) -> None:
        closing = [asyncio.create_task(close_engine(engine)) for engine in engines]
        loop = asyncio.get_running_loop()
        retiring = [task for task in list(self._retiring) if task.get_loop() is loop]
        if tasks := [*closing, *retiring]:
            await asyncio.wait(tasks)
        await finish_closing()
        for task in closing:
            task.result()

    async def _make(self, host: str | None, result_of: ResultOf = result_of) -> Opened:
        engine = await self._create(host, result_of)
        guard(engine)
        try:
            made = await result_of(self._session_maker_creator(engine))
            session_maker = check_session_maker(made)
        except BaseException:
            self._retire(engine)  # a creator may have used it
            raise
        return Opened(host, engine, session_maker)

    def _put(self, place: _Place, opened: Opened) -> list[asyncio.Task[None]]:
        """Put an engine in the place of another one; return the tasks that close the latter."""
        retired = [place.opened.engine] if place.opened is not None else []
        if self.put_by_hand is not None:
            retired.append(self.put_by_hand)
        place.opened = self.latest = opened
        self.put_by_hand = self.session_maker_put_by_hand = None
        # A creator may keep its engines, and return the one in use: its users are counted.
        return [self._retire(engine) for engine in retired]

    def _retire(self, engine: AsyncEngine) -> asyncio.Task[None]:
        task = keep(asyncio.create_task(close_engine(engine)), self._retiring)
        task.add_done_callback(_log_failure)
        return task


def _log_failure(closing: asyncio.Task[None]) -> None:
    if not closing.cancelled() and (error := closing.exception()) is not None:
        logger.warning("An engine that is not used any more failed to close", exc_info=error)


async def _wait_a_moment(retiring: list[asyncio.Task[None]]) -> None:
    # Its connections are closed when this returns, unless the server is silent.
    if retiring:
        await asyncio.wait(retiring, timeout=_MOMENT)
