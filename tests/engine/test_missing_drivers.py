"""A driver that is not installed is named, with a command that installs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In an interpreter of its own: this one has imported the drivers, and SQLAlchemy keeps them.
PROGRAM = """
import sys

hidden, expression = sys.argv[1:]
sys.modules[hidden] = None
from context_async_sqlalchemy import DBConnect, retry_on_transient_error

try:
    eval(expression)
except ImportError as error:
    print(type(error).__name__, error.name, error, sep="|")
    raise
"""


def run_without(module: str, expression: str) -> tuple[list[str], str]:
    """Return the type, the name and the message of the ImportError, and the traceback."""
    command = [sys.executable, "-c", PROGRAM, module, expression]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout.rstrip("\n").split("|"), done.stderr


@pytest.mark.parametrize(
    ("scheme", "driver", "package", "extra"),
    [
        ("postgresql", "asyncpg", "asyncpg", "postgresql"),
        ("postgresql+psycopg", "psycopg", '"psycopg[binary]"', "psycopg"),
        ("mysql", "asyncmy", "asyncmy", "mysql"),
        ("mariadb", "asyncmy", "asyncmy", "mysql"),
        ("mysql+aiomysql", "aiomysql", "aiomysql", None),
        ("sqlite", "aiosqlite", "aiosqlite", "sqlite"),
    ],
)
def test_a_missing_driver_is_named_with_its_package_and_its_extra(
    scheme: str, driver: str, package: str, extra: str | None
) -> None:
    place = "/notes.db" if scheme == "sqlite" else "app:hunter2@db.example.com/shop"
    (kind, name, message), output = run_without(driver, f"DBConnect.from_url('{scheme}://{place}')")
    assert (kind, name) == ("ModuleNotFoundError", driver)
    expected = f"The driver {driver} is not installed: 'pip install {package}'"
    if extra is not None:
        expected += f', or install context-async-sqlalchemy with its extra "{extra}"'
    assert message == expected
    assert "The above exception was the direct cause" in output
    assert "hunter2" not in message + output.replace(f"'{scheme}://{place}'", "")


def test_what_an_installed_driver_needs_is_not_taken_for_the_driver() -> None:
    (kind, name, message), _ = run_without(
        "pymysql", "DBConnect.from_url('mysql+aiomysql://app@db.example.com/shop')"
    )
    assert kind == "ModuleNotFoundError"
    assert name.startswith("pymysql")
    assert "aiomysql is not installed" not in message


def test_stamina_is_named_with_its_extra() -> None:
    (_, _, message), _ = run_without("stamina", "retry_on_transient_error()")
    assert message == (
        "Trying again needs stamina: 'pip install stamina', or install context-async-sqlalchemy "
        'with its extra "retry"'
    )
