"""An endpoint that reports whether the database answers, and how full the pool is."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import JSONResponse

from context_async_sqlalchemy._engine.border import password_of
from context_async_sqlalchemy._engine.guard import closing
from context_async_sqlalchemy._engine.log import hide_password, logger
from context_async_sqlalchemy._engine.loops import PerLoop
from context_async_sqlalchemy._engine.shield import result_within
from context_async_sqlalchemy.connect import DBConnect


def database_health(
    connect: DBConnect, timeout: float = 2.0
) -> Callable[[Request], Awaitable[JSONResponse]]:
    """Make an endpoint for health probes.

        Route("/health", database_health(connect))
        app.add_api_route("/health", database_health(connect))

    It responds 200 if the database answers, otherwise 503, with `healthy` and the counts of
    `pool_status` as `pool`. It opens and closes its own connection, so it reports a full pool
    instead of waiting for it. Probes share the connection: those that come meanwhile, or within a
    second, get the same answer. An in-memory SQLite database always answers.

    Do not expose it to the internet: it tells everybody how busy the process is.

    The reason a database is not healthy is logged, without the password; the response omits it.

    Args:
        connect: The database.
        timeout: How long the database may take to answer, in seconds. Default 2.

    Raises:
        ValueError: If `timeout` is not more than 0.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout}")

    probes = PerLoop(lambda: _Probe(connect, timeout))

    async def health(_: Request) -> JSONResponse:
        healthy = await probes.here().is_healthy()
        return JSONResponse(
            {"healthy": healthy, "pool": asdict(connect.pool_status())},
            status_code=200 if healthy else 503,
            headers={"Cache-Control": "no-store"},
        )

    return health


class _Probe:
    """Asks the database once for all who want to know at the same time, or a moment later."""

    def __init__(self, connect: DBConnect, seconds: float) -> None:
        self._connect = connect
        self._seconds = seconds
        self._asking: asyncio.Task[bool] | None = None
        self._host: str | None = None
        self._stale_at = 0.0

    async def is_healthy(self) -> bool:
        asking = self._asking
        is_stale = time.monotonic() >= self._stale_at or self._connect.host != self._host
        if asking is None or (asking.done() and is_stale):
            asking = self._asking = asyncio.create_task(self._ask())
        # A client that hangs up must not take the answer from the others.
        return await asyncio.shield(asking)

    async def _ask(self) -> bool:
        try:
            healthy = await result_within(self._seconds, _is_healthy(self._connect))
        except TimeoutError:
            healthy = False
            logger.warning(
                "The database of %r is not healthy: no answer within %s seconds",
                self._connect,
                self._seconds,
            )
        self._host = self._connect.host
        self._stale_at = time.monotonic() + _SHARED_SECONDS
        return healthy


async def _is_healthy(connect: DBConnect) -> bool:
    engine: AsyncEngine | None = None
    try:
        # Runs the connect's handler, which may choose the host.
        await connect.session_maker()
        engine = await connect._engines.make_engine(connect.host)
        async with closing(engine), engine.connect() as connection:
            await connection.execute(select(1))
    except Exception as error:
        logger.warning(
            "The database of %r is not healthy: %s: %s",
            connect,
            type(error).__name__,
            hide_password(str(error), password_of(engine or connect.engine)),
        )
        return False
    return True


_SHARED_SECONDS = 1.0
"""How long an answer is given to others: less than the pause between two probes."""
