"""fastapi-users: sign-up, login and a protected route, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.works_with.conftest import Serve

EMAILS = "SELECT email FROM works_with_user"
WELCOMES = "SELECT email FROM works_with_welcome"
PASSWORD = "a long one"


@pytest_asyncio.fixture
async def program(serve_program: Serve, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Any]:
    pytest.importorskip("fastapi_users_db_sqlalchemy", reason="asks for SQLAlchemy before 2.1")
    # Not imported by every process that collects the tests: it takes half a second.
    from fastapi_users.password import PasswordHelper
    from pwdlib import PasswordHash
    from pwdlib.hashers.argon2 import Argon2Hasher

    quick = PasswordHash([Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1)])
    monkeypatch.setattr("fastapi_users.manager.PasswordHelper", lambda: PasswordHelper(quick))
    async with serve_program("works_with.sign_up") as program:
        yield program


async def sign_up(program: Any, email: str = "ann@example.com") -> httpx.Response:
    json = {"email": email, "password": PASSWORD}
    response: httpx.Response = await program.client.post("/register", json=json)
    return response


async def test_who_has_signed_up_logs_in_and_is_known(program: Any) -> None:
    assert (await sign_up(program)).status_code == 201
    assert (await sign_up(program)).status_code == 400
    form = {"username": "ann@example.com", "password": PASSWORD}
    login = await program.client.post("/login", data=form)
    headers = {"Authorization": f"Bearer {login.json()['access_token']}"}
    assert (await program.client.get("/me", headers=headers)).json() == "ann@example.com"
    assert (await program.client.get("/me")).status_code == 401
    assert await program.outside.rows(WELCOMES) == ["ann@example.com"]


async def test_a_sign_up_that_fails_after_the_user_was_made_stores_none(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("no welcome")

    monkeypatch.setattr(program.UserManager, "on_after_register", fail)
    assert (await sign_up(program)).status_code == 500
    assert await program.outside.rows(EMAILS) == []
    # The adapter alone commits what the request, which fails, has written so far.
    monkeypatch.setattr(program, "commits_later", lambda session: session)
    assert (await sign_up(program)).status_code == 500
    assert await program.outside.rows(EMAILS) == ["ann@example.com"]


async def test_one_of_those_who_sign_up_at_once_with_one_address_succeeds(program: Any) -> None:
    answers = await asyncio.gather(*(sign_up(program) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [201] + 19 * [400]
    refusals = {answer.json()["detail"] for answer in answers if answer.status_code == 400}
    assert refusals == {"REGISTER_USER_ALREADY_EXISTS"}
    assert await program.outside.rows(EMAILS) == ["ann@example.com"]
    assert await program.outside.rows(WELCOMES) == ["ann@example.com"]


async def test_many_sign_up_at_once(program: Any) -> None:
    emails = [f"user-{number}@example.com" for number in range(20)]
    answers = await asyncio.gather(*(sign_up(program, email) for email in emails))
    assert {answer.status_code for answer in answers} == {201}
    assert sorted(await program.outside.rows(EMAILS)) == sorted(emails)
