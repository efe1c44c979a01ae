"""A connection is discarded once, though two tasks may do so at the same time.

SQLAlchemy closes it, which waits, and notes only then that its place in the pool is empty. If
another task does the same meanwhile, what a third one has opened there since is lost.
"""

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine.private_names import greenlet_spawn, take_pooled

_DISCARDED = "context_async_sqlalchemy.discarded"


def note_discarded(engine: Engine) -> None:
    """Note of each connection of an engine that it is being discarded, from now on."""
    event.listen(engine, "invalidate", _note)


async def invalidate(connection: Connection) -> None:
    """Close the connection of the driver, and let nobody use it again."""
    # A task whose statement fails for that will take it for discarded already.
    pooled = take_pooled(connection)
    if _DISCARDED not in pooled.info:  # by the task that is inside of it
        # Outside of a greenlet SQLAlchemy leaves the closing of psycopg's to the garbage collector.
        await greenlet_spawn(pooled.invalidate)


def _note(_: DBAPIConnection, entry: ConnectionPoolEntry, __: BaseException | None) -> None:
    entry.info[_DISCARDED] = True  # until there is another one in its place
