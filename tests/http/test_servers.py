"""The promise under the servers that people use, over real HTTP."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import URL

from tests.helpers.database import Database
from tests.helpers.servers import SERVERS, running_server


@pytest.fixture(scope="module", params=SERVERS)
def port(
    request: pytest.FixtureRequest, database_url: URL, tmp_path_factory: pytest.TempPathFactory
) -> Generator[int]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(request.param, database_url, log) as port:
        yield port


@pytest_asyncio.fixture
async def client(port: int, database: Database) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client of the server, and check that its requests leave no transaction open."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        yield client
    async with asyncio.timeout(5):
        while await database.states():
            await asyncio.sleep(0.01)


async def until_names_are(expected: list[str], database: Database) -> None:
    """Wait until these are the names of the rows: a background task ends after its response."""
    with suppress(TimeoutError):  # the assertion says then what is missing
        async with asyncio.timeout(5):
            while len(await database.names()) < len(expected):
                await asyncio.sleep(0.01)
    assert sorted(await database.names()) == expected


async def test_a_success_is_committed(client: httpx.AsyncClient, database: Database) -> None:
    assert (await client.post("/a")).status_code == 201
    assert await database.names() == ["a"]


@pytest.mark.parametrize(
    ("ending", "status"), [("refused", 404), ("raised", 500), ("uncommittable", 500)]
)
async def test_what_does_not_succeed_is_rolled_back(
    client: httpx.AsyncClient, database: Database, ending: str, status: int
) -> None:
    assert (await client.post(f"/a/{ending}")).status_code == status
    assert await database.names() == []
    assert await database.seats() == []


async def test_what_a_streamed_body_writes_is_committed_when_the_body_is_complete(
    client: httpx.AsyncClient, database: Database
) -> None:
    response = await client.post("/a/streamed")
    assert (response.status_code, response.text) == (200, "12")
    assert await database.names() == ["a", "a 1", "a 2"]


async def test_what_a_background_task_writes_is_committed(
    client: httpx.AsyncClient, database: Database
) -> None:
    assert (await client.post("/a/background")).status_code == 202
    assert "a" in await database.names()
    await until_names_are(["a", "a later"], database)


@pytest.mark.parametrize("size", [0, 10, 300_000])
async def test_a_request_that_is_tried_again_has_its_whole_body(
    client: httpx.AsyncClient, database: Database, size: int
) -> None:
    body = os.urandom(size)
    response = await client.post(f"/{size}/again", content=body)
    assert (response.status_code, response.content == body) == (200, True)
    assert await database.names() == [str(size)]


async def test_what_the_body_of_a_client_that_hangs_up_wrote_is_rolled_back(
    client: httpx.AsyncClient, database: Database
) -> None:
    async with client.stream("POST", "/a/endless") as response:
        assert response.status_code == 200
        parts = response.aiter_text()  # httpx hangs up when nobody holds it any more
        assert await anext(parts)
        assert await database.names() == ["a"]
    async with asyncio.timeout(5):
        while await database.states():
            await asyncio.sleep(0.01)
    assert await database.names() == ["a"]
    assert (await client.post("/b")).status_code == 201


async def test_ten_pipelined_requests_are_ten_transactions(
    port: int, client: httpx.AsyncClient, database: Database
) -> None:
    # The background task of one request is not done when the server starts the next from inside it.
    paths = [f"/{n}/{'refused' if n == 3 else 'background'}" for n in range(10)]
    requests = [f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n" for path in paths]
    requests[-1] += "Connection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("".join(f"{request}\r\n" for request in requests).encode())
    async with asyncio.timeout(30):
        received = await reader.read()
    writer.close()
    await writer.wait_closed()
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]
    assert statuses == [404 if n == 3 else 202 for n in range(10)]
    expected = [name for n in range(10) if n != 3 for name in (f"{n}", f"{n} later")]
    await until_names_are(expected, database)
