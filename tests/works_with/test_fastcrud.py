"""FastCRUD: its endpoints, and its methods in one of ours, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI, HTTPException

from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.serving import http_client
from tests.works_with.conftest import Serve

TITLES = "SELECT title FROM works_with_article ORDER BY id"


@pytest_asyncio.fixture
async def program(serve_program: Serve) -> AsyncGenerator[Any]:
    async with serve_program("works_with.crud") as program:
        yield program


async def test_the_endpoints_create_read_update_and_delete(program: Any) -> None:
    client = program.client
    made = await client.post("/articles", json={"title": "one"})
    assert made.status_code == 200
    path = f"/articles/{made.json()['id']}"
    assert await program.outside.rows(TITLES) == ["one"]
    assert (await client.patch(path, json={"title": "two"})).status_code == 200
    assert (await client.get(path)).json()["title"] == "two"
    assert [a["title"] for a in (await client.get("/articles")).json()["data"]] == ["two"]
    assert (await client.delete(path)).status_code == 200
    assert (await client.get(path)).status_code == 404
    assert await program.outside.rows(TITLES) == []


async def test_an_endpoint_stores_nothing_of_a_request_that_is_refused_later(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: object) -> None:
        raise HTTPException(409)

    app = FastAPI()
    app.include_router(program.router)
    add_fastapi_http_db_session_middleware(app, before_commit=refuse)
    assert (await program.client.get("/articles")).status_code == 200  # has made its table
    async with http_client(app) as client:
        assert (await client.post("/articles", json={"title": "one"})).status_code == 409
        assert await program.outside.rows(TITLES) == []
        # FastCRUD alone commits what the request has written so far.
        monkeypatch.setattr(program, "commits_later", lambda session: session)
        assert (await client.post("/articles", json={"title": "one"})).status_code == 409
        assert await program.outside.rows(TITLES) == ["one"]


async def test_the_methods_leave_the_commit_to_the_request(program: Any) -> None:
    assert (await program.client.post("/drafts", json=["one", "two"])).status_code == 201
    assert await program.outside.rows(TITLES) == ["one", "two"]
    assert (await program.client.post("/drafts", json=["three", "\0"])).status_code == 500
    assert await program.outside.rows(TITLES) == ["one", "two"]


async def test_clients_create_at_the_same_time(program: Any) -> None:
    titles = [f"{number:02}" for number in range(20)]
    posts = (program.client.post("/articles", json={"title": title}) for title in titles)
    assert {answer.status_code for answer in await asyncio.gather(*posts)} == {200}
    assert sorted(await program.outside.rows(TITLES)) == titles
