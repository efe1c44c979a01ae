"""The options of engines and of sessions, and the class of the latter, for type checkers."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict

from sqlalchemy import Pool
from sqlalchemy.engine.interfaces import IsolationLevel
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


class EngineOptions(TypedDict, total=False):
    """The options of `sqlalchemy.create_engine()` that `from_url` takes.

    See https://docs.sqlalchemy.org/en/20/core/engines.html#sqlalchemy.create_engine.params
    """

    async_creator: Callable[[], Awaitable[Any]]
    connect_args: dict[str, Any]
    echo: bool | Literal["debug"]
    echo_pool: bool | Literal["debug"]
    enable_from_linting: bool
    execution_options: Mapping[str, Any]
    future: Literal[True]
    hide_parameters: bool
    insertmanyvalues_page_size: int
    isolation_level: IsolationLevel | None
    json_deserializer: Callable[[str], Any]
    json_serializer: Callable[[Any], str]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    max_overflow: int
    native_inet_types: bool
    plugins: Sequence[str]
    pool_logging_name: str
    pool_pre_ping: bool
    pool_recycle: int
    pool_reset_on_return: Literal["rollback", "commit"] | None
    pool_size: int
    pool_timeout: float
    pool_use_lifo: bool
    poolclass: type[Pool]
    query_cache_size: int
    skip_autocommit_rollback: bool
    use_insertmanyvalues: bool


class URLOptions(EngineOptions, Generic[SessionT], total=False):
    """What `from_url` adds to them; its docstring describes them, with their defaults."""

    session_options: SessionOptions[SessionT] | None
    ping_after_idle: float
    idle_timeout: float | None
    min_idle: int
    max_waiting: int | None
    transaction_settings: Callable[[], Mapping[str, str | int]] | None
    begin_with_first_statement: bool
    verify_commits: bool
    verify_timeout: float
