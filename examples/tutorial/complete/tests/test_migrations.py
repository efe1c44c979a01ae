"""The migrations make the tables that the models describe."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def test_the_migrations_make_what_the_models_describe() -> None:
    config = Config(Path(__file__).parents[1] / "alembic.ini")
    command.check(config)
