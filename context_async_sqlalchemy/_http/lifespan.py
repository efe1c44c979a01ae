"""The lifespan of an application, which closes its databases."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette

from context_async_sqlalchemy.connect import DBConnect


def database_lifespan(
    *connects: DBConnect, wait: bool = False
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Make the lifespan of an application, which closes the connects at its end.

        app = Starlette(lifespan=database_lifespan(connect, wait=True))

    Args:
        *connects: The databases.
        wait: Whether to wait until each of them answers, as `DBConnect.wait_until_ready` does by
            default; the application does not start if one does not. Default False.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for connect in connects:
                await stack.enter_async_context(connect)
            if wait:
                for connect in connects:
                    await connect.wait_until_ready()
            yield

    return lifespan
