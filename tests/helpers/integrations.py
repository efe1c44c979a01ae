"""What a handler of each framework does and raises, and who logs it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import blacksheep
import blacksheep.exceptions
import blacksheep.testing
import fastapi
import httpx
import litestar
import litestar.exceptions
import litestar.testing
import starlette.exceptions
import werkzeug.exceptions
from sqlalchemy import text

from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.programs import until
from tests.helpers.serving import http_client

NOT_FOUND: dict[str, Callable[[], Exception]] = {
    "fastapi": lambda: fastapi.HTTPException(404),
    "starlette": lambda: starlette.exceptions.HTTPException(404),
    "litestar": litestar.exceptions.NotFoundException,
    "quart": werkzeug.exceptions.NotFound,
    "blacksheep": blacksheep.exceptions.NotFound,
}
"""What a handler of each framework raises for a 404; pure ASGI has no such thing."""

LOGGERS = {
    "fastapi": "uvicorn.error",
    "starlette": "uvicorn.error",
    "asgi": "uvicorn.error",
    "litestar": "litestar",
    "quart": "examples.integrations.quart",
    "blacksheep": "blacksheep.server",
}
"""Who logs an exception of a handler."""


@asynccontextmanager
async def served(program: Any, database: Database, app: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an application of the program; at the end no connection is left checked out."""
    async with http_client(app, log_level="error") as client:
        yield client
        await until(lambda: connections_out(program.connect) == 0)
        assert await database.states() == []


Work = Callable[[str], Awaitable[int]]


async def succeed(_: str) -> int:
    return 201


async def stumble(title: str) -> int:
    if title.endswith("bad"):
        raise RuntimeError("stumbled")
    return 201


async def lose_race(session: Any) -> None:
    await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
