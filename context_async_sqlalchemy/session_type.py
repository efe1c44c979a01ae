"""The class of the sessions that a connect makes, and their options, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    # A default of a type variable is new in Python 3.13.
    from typing_extensions import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession, default=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, default=AsyncSession, covariant=True)
else:
    from typing import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, covariant=True)


class SessionOptions(TypedDict, Generic[SessionT], total=False):
    """The options of `async_sessionmaker`.

    See https://docs.sqlalchemy.org/en/20/orm/session_api.html#sqlalchemy.orm.Session.params
    """

    class_: type[SessionT]
    autobegin: bool
    autocommit: Literal[False]
    autoflush: bool
    binds: Mapping[Any, Any]
    close_resets_only: bool
    enable_baked_queries: bool
    expire_on_commit: bool
    future: Literal[True]
    info: dict[Any, Any]
    join_transaction_mode: Literal[
        "conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"
    ]
    query_cls: type[Any]
    sync_session_class: type[Session]
    twophase: bool
