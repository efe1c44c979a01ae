"""What is out of the pool of a connect."""

from __future__ import annotations

from context_async_sqlalchemy import DBConnect


def connections_out(connect: DBConnect) -> int:
    """Return how many connections are out of the pool."""
    return connect.pool_status().checked_out
