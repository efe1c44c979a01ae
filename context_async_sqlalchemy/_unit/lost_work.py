"""What a response rolls back is said, to those who look for their rows."""

import logging

from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.release import connections_of
from context_async_sqlalchemy._engine.written import rows_written
from context_async_sqlalchemy._unit.context import DBSessionContext


def tell_of_lost_work(context: DBSessionContext, status: int) -> None:
    """Log, at INFO, what the response with this status is about to roll back, if it is anything."""
    if not logger.isEnabledFor(logging.INFO):
        return
    sessions = context.in_transaction()
    rows, objects = (sum(counts) for counts in zip((0, 0), *map(written, sessions), strict=True))
    if rows or objects:
        logger.info(
            "The response %s rolls back what its request has written (%s): rows: %s, objects that "
            "were not flushed: %s",
            status,
            context.name,
            rows,
            objects,
        )


def tell_of_cut_off_body() -> None:
    """Warn of a response that was not completed, and so rolls back what its body has written."""
    # Starlette stops the body of a client that hangs up, and returns as if it had ended.
    logger.warning(
        "A response was not completed, as when its client hangs up: what was written after it had "
        "started is rolled back."
    )


def written(session: AsyncSession) -> tuple[int, int]:
    """Return how many rows and unflushed objects a rollback would undo, as far as it is known."""
    rows = sum(map(rows_written, connections_of(session)))
    modified = sum(map(session.is_modified, session.dirty))
    return rows, len(session.new) + modified + len(session.deleted)
