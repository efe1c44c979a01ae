"""Migrate the database, and serve; arguments are passed to uvicorn, such as `--port 8001`."""

import sys
from pathlib import Path

import uvicorn
from alembic import command
from alembic.config import Config

if __name__ == "__main__":
    command.upgrade(Config(Path(__file__).with_name("alembic.ini")), "head")
    uvicorn.main(["examples.sqlmodel_tasks.app:app", *sys.argv[1:]])
