"""Idempotency keys on MariaDB, which has another way to insert one, and another time-out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator

import pytest
import pytest_asyncio
import stamina
from sqlalchemy import URL, select, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, new_non_ctx_atomic_session, new_non_ctx_session
from context_async_sqlalchemy.idempotency import delete_expired_keys
from tests.helpers.asgi import add
from tests.helpers.idempotency import KEYS, is_replay, post, with_keys
from tests.helpers.mariadb import mariadb, mariadb_binary
from tests.helpers.models import Item
from tests.helpers.programs import until
from tests.helpers.serving import http_client

pytestmark = pytest.mark.skipif(
    mariadb_binary() is None, reason="mariadbd is not installed: apt-get install mariadb-server"
)
SECONDS = 2  # in which three requests have to come to wait


@pytest.fixture(scope="module")
def server() -> Generator[URL]:
    with mariadb() as url:
        yield url


@pytest_asyncio.fixture
async def connect(server: URL) -> AsyncGenerator[DBConnect]:
    # With asyncmy: aiomysql 0.3.2 cannot send bytes.
    arguments = {"init_command": f"SET innodb_lock_wait_timeout = {SECONDS}"}
    async with DBConnect.from_url(server, connect_args=arguments, pool_size=5) as connect:
        async with new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            for table in Item.metadata.tables["item"], KEYS:
                await connection.run_sync(table.drop, checkfirst=True)
                await connection.run_sync(table.create)
        yield connect
        assert connect.pool_status().checked_out == 0


async def names(connect: DBConnect) -> list[str]:
    async with new_non_ctx_session(connect) as session:
        return list(await session.scalars(select(Item.name).order_by(Item.id)))


async def test_what_is_promised_holds_and_the_time_out_is_that_of_the_server(
    connect: DBConnect,
) -> None:
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def create(request: Request) -> Response:
        body = await request.body()
        await add(connect, body.decode())
        if body == b"slow":
            has_begun.set()
            await may_go_on.wait()
        return Response(bytes(range(256)) * 300, 400 if body == b"refused" else 201)

    app = with_keys(Starlette(routes=[Route("/", create, methods=["POST"])]), connect)
    async with http_client(app) as client:
        responses = await asyncio.gather(*(post(client, "/", body="a") for _ in range(10)))
        assert {(r.status_code, r.content) for r in responses} == {(201, bytes(range(256)) * 300)}
        assert sum(map(is_replay, responses)) == 9
        assert (await post(client, "/", body="b")).status_code == 422
        assert (await post(client, "/", "2", body="refused")).status_code == 400
        assert not is_replay(await post(client, "/", "2", body="b"))
        assert not is_replay(await post(client, "/", "A", body="d"))
        assert not is_replay(await post(client, "/", "a", body="c"))  # the same to its collation

        first = asyncio.create_task(post(client, "/", "3", body="slow"))
        await has_begun.wait()
        assert (await post(client, "/", "3", body="slow")).status_code == 409
        may_go_on.set()
        assert (await first).status_code == 201
    assert await names(connect) == ["a", "b", "d", "c", "slow"]
    assert await delete_expired_keys(connect, KEYS) == 0


async def are_waiting(connect: DBConnect, number: int) -> bool:
    # InnoDB renews the table only if nobody has read it for 0.1 seconds.
    await asyncio.sleep(0.11)
    query = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    async with new_non_ctx_session(connect) as session:
        return bool(await session.scalar(text(query)) == number)


@pytest.mark.parametrize(("attempts", "statuses"), [(1, {200, 409}), (5, {200})])
async def test_after_a_rollback_one_of_those_that_wait_is_done(
    connect: DBConnect, attempts: int, statuses: set[int]
) -> None:
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()
    calls = 0

    async def create(_: Request) -> Response:
        nonlocal calls
        calls += 1
        await add(connect, "a")
        if has_begun.is_set():
            return Response()
        has_begun.set()
        await may_go_on.wait()
        return Response(status_code=400)

    starlette = Starlette(routes=[Route("/", create, methods=["POST"])])
    app = with_keys(starlette, connect, {"attempts": attempts})
    with stamina.set_testing(True, attempts=attempts):
        async with http_client(app) as client:
            first = asyncio.create_task(post(client, "/"))
            await has_begun.wait()
            others = [asyncio.create_task(post(client, "/")) for _ in range(3)]
            await until(lambda: are_waiting(connect, 3))
            may_go_on.set()
            assert (await first).status_code == 400
            answers = [await other for other in others]
    assert {answer.status_code for answer in answers} == statuses
    assert calls == 2
    assert await names(connect) == ["a"]
