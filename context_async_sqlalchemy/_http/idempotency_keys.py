"""The table of idempotency keys: a key is inserted, found, and given its answer."""

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    JSON,
    Column,
    CursorResult,
    DateTime,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.commits import is_autocommit
from context_async_sqlalchemy.asgi_types import Message
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.session import new_non_ctx_atomic_session


def idempotency_table(metadata: MetaData, name: str = "idempotency_key") -> Table:
    """Make the table of the keys and their answers, for `metadata.create_all` and for Alembic.

    Args:
        metadata: That of the application's own tables.
        name: The name of the table. Default "idempotency_key".
    """
    return Table(
        name,
        metadata,
        # Digests: of any length and any characters, whatever the database takes for equal.
        Column("id", String(64), primary_key=True),  # of the caller and the key
        Column("fingerprint", String(64), nullable=False),  # of the request
        Column("expires_at", DateTime, nullable=False, index=True),  # UTC
        Column("status", Integer),
        Column("headers", JSON),
        Column("body", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")),
    )


async def delete_expired_keys(connect: DBConnect[Any], table: Table) -> int:
    """Delete the keys that have expired, in a transaction of its own, and return how many.

    Until then their answers are still sent: call it once in a while.

    Args:
        connect: The database.
        table: What `idempotency_table` has returned.
    """
    async with new_non_ctx_atomic_session(connect) as session:
        result = await session.execute(delete(table).where(table.c.expires_at <= _now()))
        return cast("CursorResult[Any]", result).rowcount


class Names(NamedTuple):
    """What is known of a request with a key."""

    id: str  # of the key, among those of all callers
    fingerprint: str  # of the request


class Keys:
    """The statements on the table."""

    def __init__(self, table: Table, expires_after: float, lock_timeout: float) -> None:
        self._table = table
        self._expires_after = timedelta(seconds=expires_after)
        columns = ("id", "fingerprint", "expires_at")
        values = {name: bindparam(name, type_=table.c[name].type) for name in columns}
        # In one round trip: the time-out is for this statement only, not for the application's.
        before = select(func.current_setting("lock_timeout").label("value")).cte("before")
        set_timeout = func.set_config("lock_timeout", f"{max(1, int(lock_timeout * 1000))}ms", True)
        row = select(*values.values()).select_from(before).where(set_timeout.is_not(None))
        restore = func.set_config("lock_timeout", select(before.c.value).scalar_subquery(), True)
        in_postgresql = postgresql.insert(table).from_select(columns, row).on_conflict_do_nothing()
        self._claim_in_postgresql = in_postgresql.returning(restore)
        self._claim = insert(table).values(values)
        is_named = table.c.id == bindparam("id_")
        self._find = select(table).where(is_named)
        self._answer = update(table).where(is_named)

    async def claim(self, session: AsyncSession, names: Names) -> bool:
        """Insert a key, if no other transaction does, or has; return whether it was inserted."""
        connection = await session.connection(bind_arguments={"clause": self._table})
        if is_autocommit(cast("Any", connection.sync_connection)):
            raise RuntimeError(
                "idempotency keys need a transaction, and the session has none: it is in "
                "AUTOCOMMIT, or read-only (take the method out of read_only_methods)"
            )
        expires_at = _now() + self._expires_after
        values = {"id": names.id, "fingerprint": names.fingerprint, "expires_at": expires_at}
        if connection.dialect.name == "postgresql":  # where an error ends the transaction
            result = await session.execute(self._claim_in_postgresql, values)
            return result.first() is not None
        try:
            await session.execute(self._claim, values)
        except IntegrityError:
            return False
        return True

    async def find(self, session: AsyncSession, names: Names) -> Any:
        """Return the row of a key, if there is one."""
        return (await session.execute(self._find, {"id_": names.id})).one_or_none()

    async def answer(
        self, session: AsyncSession, names: Names, start: Message, body: bytes
    ) -> bool:
        """Store the answer to the request with a key; return whether the key is still there."""
        headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in start.get("headers", ())]
        answer = {"status": start["status"], "headers": headers, "body": body}
        result = await session.execute(self._answer, {"id_": names.id, **answer})
        return cast("CursorResult[Any]", result).rowcount == 1


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
