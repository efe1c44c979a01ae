"""The database of the application and its jobs; importing it opens nothing."""

from sqlmodel.ext.asyncio.session import AsyncSession

from context_async_sqlalchemy import DBConnect
from examples.sqlmodel_tasks.settings import settings

url = settings.database_url.get_secret_value()
is_sqlite = url.startswith("sqlite")

connect = DBConnect.from_url(
    url,
    session_options={"class_": AsyncSession},
    # SQLite has no other level. IMMEDIATE takes the write lock at BEGIN: a
    # transaction that has already read could not wait for it.
    isolation_level=None if is_sqlite else "SERIALIZABLE",
    connect_args={"timeout": settings.database_timeout}
    | ({"isolation_level": "IMMEDIATE"} if is_sqlite else {}),
    echo=settings.database_echo,
    pool_size=settings.database_pool_size,
    max_overflow=settings.database_max_overflow,
    pool_pre_ping=settings.database_pool_pre_ping,
    pool_recycle=settings.database_pool_recycle,
)
