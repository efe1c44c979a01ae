"""Waiting for a database that may start after the process."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from context_async_sqlalchemy._engine.border import password_of
from context_async_sqlalchemy._engine.log import hide_password, logger


async def until_ready(
    connect: Any, execute: Callable[[], Awaitable[None]], attempts: int, delay: float
) -> None:
    """Execute something on the database of a connect until it succeeds; log each failure."""
    for attempt in range(1, attempts + 1):
        try:
            await execute()
        except (TypeError, ValueError):
            raise  # a mistake in the program, which does not go away
        except Exception as error:
            logger.warning(
                "The database of %r is not ready (attempt %s of %s): %s: %s",
                connect,
                attempt,
                attempts,
                type(error).__name__,
                hide_password(str(error), password_of(connect.engine)),
            )
            if attempt == attempts:
                raise
            await asyncio.sleep(delay)
        else:
            return
