"""The database of the application, as the environment says."""

import os

from context_async_sqlalchemy import DBConnect

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///library.db"),
    os.environ.get("DATABASE_PASSWORD"),
    pool_size=int(os.environ.get("DATABASE_POOL_SIZE", "5")),
    max_overflow=0,
    pool_timeout=3,  # seconds until a request that gets no connection is a 503
)
