"""A request with an idempotency key is sent again, when nobody knows what became of it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from sqlalchemy import URL

from tests.helpers.database import Database
from tests.helpers.idempotency import is_replay, post, statuses, table_of_keys
from tests.helpers.idempotent_app import make_app
from tests.helpers.programs import Outside
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.servers import running_module
from tests.helpers.serving import http_client

SERVER = "uvicorn tests.helpers.idempotent_app:app --port {port}"


@pytest.mark.parametrize(
    ("step", "is_done"),
    [("in the handler", False), ("before COMMIT", False), ("after COMMIT", True)],
)
async def test_a_request_whose_server_is_killed_is_sent_again_and_done_once(
    database_url: URL, database: Database, tmp_path: Path, step: str, is_done: bool
) -> None:
    url = database_url.render_as_string(hide_password=False)
    outside, log = Outside(url), tmp_path / "log"
    async with table_of_keys(outside):
        with running_module(SERVER, log, SERVED_DATABASE_URL=url, KILLED=step) as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                with pytest.raises(httpx.TransportError):
                    await post(client, "/", body="a")
        await database.is_quiet()
        assert await database.names() == (["a"] if is_done else [])
        assert await statuses(outside) == ([201] if is_done else [])

        async with http_client(make_app(url), lifespan="on") as client:
            for is_second in False, True:
                response = await post(client, "/", body="a")
                assert (response.status_code, response.text) == (201, "made a")
                assert is_replay(response) is (is_done or is_second)
        assert await database.names() == ["a"]


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER])
async def test_a_request_whose_commit_is_lost_is_sent_again_and_done_once(
    database_url: URL, database: Database, fault: Fault
) -> None:
    faults = [fault]

    async def lose_commit(call: Call) -> Fault | None:
        return faults.pop() if call.statement.startswith("COMMIT") and faults else None

    outside = Outside(database_url.render_as_string(hide_password=False))
    assert database_url.host is not None
    assert database_url.port is not None
    async with (
        table_of_keys(outside),
        proxy(database_url.host, database_url.port, lose_commit) as port,
    ):
        url = database_url.set(host="127.0.0.1", port=port)
        app = make_app(url.render_as_string(hide_password=False))
        async with http_client(app, lifespan="on") as client:
            assert (await post(client, "/", body="a")).status_code == 500
            await database.is_quiet()
            response = await post(client, "/", body="a")
        assert (response.status_code, response.text) == (201, "made a")
        assert is_replay(response) is (fault is Fault.LOST_AFTER)
        assert await database.names() == ["a"]
