"""Request-scoped sessions for SQLAlchemy's asyncio extension: 2xx means committed."""

from typing import TYPE_CHECKING

from context_async_sqlalchemy._engine.driver_errors import is_transient_error
from context_async_sqlalchemy._engine.pool import PoolStatus
from context_async_sqlalchemy._engine.wrong_module import says_where
from context_async_sqlalchemy._http.middleware import ASGIHTTPDBSessionMiddleware
from context_async_sqlalchemy._unit.blocks import new_db_session_ctx, run_in_new_ctx
from context_async_sqlalchemy._unit.on_commit import on_commit
from context_async_sqlalchemy._unit.retry import retry_on_transient_error
from context_async_sqlalchemy.auto_commit import (
    BeforeCommitCallback,
    auto_commit_by_status_code,
    close_all_sessions,
    commit_after_response,
    commit_all_sessions,
    roll_back_this_request,
    rollback_all_sessions,
)
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import (
    get_db_session_from_context,
    init_db_session_ctx,
    is_context_initiated,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
)
from context_async_sqlalchemy.exceptions import (
    CommitOutcomeUnknownError,
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
)
from context_async_sqlalchemy.session import (
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
    same_snapshot,
)

__all__ = [
    "ASGIHTTPDBSessionMiddleware",
    "BeforeCommitCallback",
    "CommitOutcomeUnknownError",
    "ContextAlreadyInitiatedError",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "DBConnect",
    "PoolStatus",
    "atomic_db_session",
    "auto_commit_by_status_code",
    "close_all_sessions",
    "close_db_session",
    "commit_after_response",
    "commit_all_sessions",
    "commit_db_session",
    "db_session",
    "get_db_session_from_context",
    "init_db_session_ctx",
    "is_context_initiated",
    "is_transient_error",
    "new_db_session_ctx",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "on_commit",
    "pop_db_session_from_context",
    "put_db_session_to_context",
    "reset_db_session_ctx",
    "retry_on_transient_error",
    "roll_back_this_request",
    "rollback_all_sessions",
    "rollback_db_session",
    "run_in_new_ctx",
    "same_snapshot",
]

if not TYPE_CHECKING:  # which would take every name for one that is there
    __getattr__ = says_where(__name__)
