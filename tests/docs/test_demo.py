"""The demo: right as it is, and not satisfied with a middleware that is broken."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import URL

from context_async_sqlalchemy._http import send
from context_async_sqlalchemy._unit.settle import settle
from examples import demo


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_the_demo_passes(backend: str, database_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "postgresql":
        monkeypatch.setenv("DATABASE_URL", database_url.render_as_string(hide_password=False))
    else:
        monkeypatch.delenv("DATABASE_URL", raising=False)
    result = subprocess.run(
        [sys.executable, "-m", "examples.demo"], capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""
    assert "7 of 7 requests came out as they should." in result.stdout
    assert result.returncode == 0


def test_the_demo_fails_when_errors_are_committed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def always_commit(context: Any, *, commit: bool, before_commit: Any) -> None:
        await settle(context, commit=True, before_commit=before_commit)

    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setattr(send, "settle", always_commit)
    assert demo.main() == 1
    assert "5 of 7 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense secret", "is not the URL of an async driver"),
        ("sqlite:///secret.db", "is not the URL of an async driver"),
        ("postgresql+asyncpg://u:secret@127.0.0.1:1/d", "cannot be used: ConnectionRefusedError"),
    ],
)
def test_the_demo_refuses_a_bad_url_without_showing_it(
    url: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    assert demo.main() == 1
    output = capsys.readouterr()
    assert message in output.err
    assert "secret" not in output.out + output.err
