"""A COMMIT whose connection was lost is looked up on another connection, with PostgreSQL.

The number of the transaction is asked for before COMMIT, with what identifies this run of the
server; https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection

from context_async_sqlalchemy._engine.driver_errors import (
    is_refused_commit,
    says_connection_is_lost,
)
from context_async_sqlalchemy._engine.guard import closing
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import await_only, replace_of_dialect
from context_async_sqlalchemy._engine.shield import result_within

_COMMITTING = "context_async_sqlalchemy.committing"

# A standby that was promoted, and a server that has crashed, may give a number again that was lost
# with its transaction: it is then of another one, which may be committed. The first has another
# timeline, the second, which may have kept its postmaster, has recovered up to another position.
_RUN = """concat_ws('/',
    (SELECT system_identifier FROM pg_catalog.pg_control_system()),
    left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8),
    pg_catalog.pg_postmaster_start_time(),
    pg_catalog.pg_last_wal_replay_lsn())"""

# No row if nothing was written: a standby could not say the rest.
_ASK = f"""SELECT xid::text, {_RUN}
FROM (SELECT pg_catalog.pg_current_xact_id_if_assigned() AS xid) AS own WHERE xid IS NOT NULL"""

_ASK_LATER = text(f"""SELECT CASE
    WHEN pg_catalog.pg_is_in_recovery() THEN 'in recovery'
    WHEN {_RUN} = :run THEN pg_catalog.pg_xact_status(CAST(CAST(:xid AS text) AS xid8))
    ELSE 'of another run of the server' END""")

_FINAL = ("committed", "aborted", "forgotten", "of another run of the server")

# Its own commit waits for what the one before it should have waited for, such as a standby.
_COMMIT_ANOTHER = text("SELECT pg_catalog.pg_logical_emit_message(true, 'verify_commits', '')")


def check_verify_commits(url: URL, timeout: float) -> None:
    """Refuse a database that cannot be asked, before there is an engine."""
    if (name := url.get_dialect().name) != "postgresql":
        raise ValueError(
            f"verify_commits needs PostgreSQL: {name} cannot say later what a transaction has come "
            "to. Leave the option out"
        )
    if not timeout > 0:
        raise ValueError(f"verify_timeout must be more than 0 seconds, not {timeout}")


def verify_commits(engine: Engine, timeout: float, make_engine: Callable[[], AsyncEngine]) -> None:
    """Let each COMMIT of an engine whose connection is lost be looked up, from now on.

    Args:
        engine: The engine.
        timeout: The seconds that this may take.
        make_engine: Makes another one for the same server.
    """
    _Verifier(engine, timeout, make_engine)


class _Verifier:
    """Commits the connections of an engine."""

    def __init__(
        self, engine: Engine, timeout: float, make_engine: Callable[[], AsyncEngine]
    ) -> None:
        self._dialect = engine.dialect
        self._do_commit = engine.dialect.do_commit
        self._timeout = timeout
        self._make_engine = make_engine
        replace_of_dialect(engine.dialect, "do_commit", self._commit)
        event.listen(engine, "commit", _note)

    def _commit(self, pooled: PoolProxiedConnection) -> None:
        connection: Connection | None = pooled.info.pop(_COMMITTING, None)
        if connection is None or not _has_begun(pooled.driver_connection):
            self._do_commit(pooled)
            return
        own = self._ask(pooled)
        try:
            self._do_commit(pooled)
        except Exception as error:
            if not self._is_lost(error, pooled):
                raise
            status = await_only(self._look_up(*own)) if own else "nothing to commit"
            logger.warning("The connection was lost during COMMIT; the transaction is: %s", status)
            if status in ("aborted", "nothing to commit"):
                raise self._not_committed(f"was lost during COMMIT: {status}") from error
            if status != "committed":
                error.add_note(f"verify_commits: the transaction is {status}")
                raise
            connection.invalidate()

    def _ask(self, pooled: PoolProxiedConnection) -> tuple[str, str] | None:
        """Return the number of a transaction, and the run of the server; None if it only reads."""
        cursor = pooled.cursor()
        try:
            cursor.execute(_ASK)
            return cursor.fetchone()
        except self._dialect.loaded_dbapi.Error as error:
            sqlstate = getattr(error, "sqlstate", None) or ""
            if sqlstate == "25P02":
                return None  # a statement has failed, and COMMIT will tell
            if self._is_lost(error, pooled):
                raise self._not_committed("was lost before COMMIT was sent") from error
            if sqlstate.startswith("42"):  # a function that is not there, or is forbidden
                error.add_note("verify_commits needs PostgreSQL 13 or newer, and these functions")
            raise
        finally:
            cursor.close()

    def _is_lost(self, error: Exception, pooled: PoolProxiedConnection) -> bool:
        dialect = self._dialect
        return (
            isinstance(error, dialect.loaded_dbapi.Error)
            and not is_refused_commit(error, dialect)
            and (
                dialect.is_disconnect(error, pooled.dbapi_connection, None)
                or says_connection_is_lost(error)
            )
        )

    def _not_committed(self, why: str) -> Exception:
        # As a driver says that it has sent nothing.
        error: Any = self._dialect.loaded_dbapi.InterfaceError(
            f"The connection {why}. The transaction is not committed, and may be repeated"
        )
        error.sqlstate = "08006"
        return error  # type: ignore[no-any-return]

    async def _look_up(self, xid: str, run: str) -> str:
        """Return what the server says of a transaction in the end, or what keeps it from that."""
        found = ["not known"]

        async def ask() -> None:
            pause = 0.01
            task = asyncio.current_task()
            assert task is not None
            async with closing(self._make_engine()) as engine:
                # psycopg may answer a cancellation with an error of its own.
                while found[-1] not in _FINAL and not task.cancelling():
                    try:
                        found.append(await _ask_later(engine, xid, run))
                    except Exception as error:
                        found.append(f"not known ({type(error).__name__})")
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.5)

        with suppress(Exception):  # such as the time-out, or an engine that fails to close
            await result_within(self._timeout, ask())
        return found[-1]


async def _ask_later(engine: AsyncEngine, xid: str, run: str) -> str:
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        status: str | None = await connection.scalar(_ASK_LATER, {"xid": xid, "run": run})
        if status == "committed":
            await connection.execute(_COMMIT_ANOTHER)
        return status or "forgotten"


def _note(connection: Connection) -> None:
    connection.info[_COMMITTING] = connection


def _has_begun(driver: Any) -> bool:
    """Return whether the server knows of a transaction: it has none yet, or AUTOCOMMIT has none."""
    if hasattr(driver, "is_in_transaction"):  # asyncpg's
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status.name != "IDLE")
