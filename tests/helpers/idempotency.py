"""Applications with idempotency keys, and what is in the table of the keys."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sqlalchemy import MetaData

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect
from context_async_sqlalchemy.asgi_types import ASGIApp, Scope
from context_async_sqlalchemy.idempotency import IdempotencyMiddleware, idempotency_table
from tests.helpers.programs import Outside

KEYS = idempotency_table(MetaData())


@asynccontextmanager
async def table_of_keys(outside: Outside) -> AsyncGenerator[None]:
    """Make the table for a block."""
    async with outside.connection() as connection:
        await connection.run_sync(KEYS.create)
    try:
        yield
    finally:
        async with outside.connection() as connection:
            await connection.run_sync(KEYS.drop)


async def statuses(outside: Outside) -> list[int | None]:
    """Return the status of each key that is committed."""
    return list(await outside.rows(f"SELECT status FROM {KEYS.name} ORDER BY status"))


def user_of(scope: Scope) -> str:
    """Return the user of a request: in the tests, a client says who it is."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    return headers.get(b"user", b"").decode()


def with_keys(
    app: ASGIApp, connect: DBConnect, outer: dict[str, Any] | None = None, **options: Any
) -> ASGIApp:
    """Put both middlewares around an application; `outer` are the options of the outer one."""
    keyed = IdempotencyMiddleware(app, connect, KEYS, **{"caller": user_of} | options)
    return ASGIHTTPDBSessionMiddleware(keyed, **outer or {})


async def post(
    client: httpx.AsyncClient, path: str, key: str | None = "1", user: str = "ann", body: str = ""
) -> httpx.Response:
    """Send a request with a key."""
    headers = {"user": user} | ({"idempotency-key": key} if key is not None else {})
    return await client.post(path, content=body, headers=headers)


def is_replay(response: httpx.Response) -> bool:
    """Return whether a response says that it was sent before."""
    return "idempotency-replayed" in response.headers
