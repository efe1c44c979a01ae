"""Bring the database up to date, and serve the application."""

from pathlib import Path

import uvicorn
from alembic import command
from alembic.config import Config

from examples.sqlmodel_tasks.app import app
from examples.sqlmodel_tasks.settings import settings

if __name__ == "__main__":
    command.upgrade(Config(Path(__file__).with_name("alembic.ini")), "head")
    uvicorn.run(app, host=settings.host, port=settings.port)
