"""The database of the application."""

import os

from context_async_sqlalchemy import DBConnect

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///library.db")
)
