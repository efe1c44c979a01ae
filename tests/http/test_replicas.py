"""A primary and its replica in the place of a connect: where each context goes."""

import asyncio
import copy
import logging
import math
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
import pytest_asyncio
from fastapi import Depends, FastAPI, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import TextClause, make_url, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_after_response,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    on_commit,
    run_in_new_ctx,
)
from context_async_sqlalchemy._engine import standby as _standby
from context_async_sqlalchemy._engine.standby import Standby
from context_async_sqlalchemy._http.position_cookie import UNKNOWN, PositionCookie
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.observability import count_queries
from context_async_sqlalchemy.replicas import Replicated, on_primary, on_replica
from context_async_sqlalchemy.test_utils import set_test_context, shared_transaction
from tests.helpers.cluster import copy_of, primary_and_standby
from tests.helpers.postgres import Server, free_port, frozen
from tests.helpers.programs import until
from tests.helpers.serving import http_client

pytestmark = pytest.mark.usefixtures("no_pauses")

SECRET = "of the tests, and of nobody else"
COOKIE = "db_position"
INSERT, SELECT = "INSERT INTO note VALUES (:body)", "SELECT body FROM note ORDER BY body"
PAUSED = "SELECT WHERE pg_get_wal_replay_pause_state() = 'paused'"
WHO = "SELECT CASE WHEN pg_is_in_recovery() THEN 'replica' ELSE 'primary' END"


@pytest.fixture(scope="module")
def cluster() -> Generator[tuple[Server, Server]]:
    """Return a primary and its standby, which every test leaves as they were."""
    with primary_and_standby() as servers:
        servers[0].psql("CREATE TABLE note (body text)")
        yield servers


@pytest_asyncio.fixture(autouse=True)
async def no_notes(cluster: tuple[Server, Server]) -> None:
    primary, standby = cluster
    await primary.fetch("TRUNCATE note")
    [row] = await primary.fetch("SELECT CAST(pg_current_wal_insert_lsn() AS text)")
    await until(lambda: standby.fetch(f"SELECT WHERE pg_last_wal_replay_lsn() >= '{row[0]}'"))


@pytest_asyncio.fixture
async def database(cluster: tuple[Server, Server]) -> AsyncGenerator[Replicated[Any]]:
    async with made(*cluster) as database:
        yield database


@asynccontextmanager
async def made(
    primary: Server | str, replica: Server | str, **options: Any
) -> AsyncGenerator[Replicated[Any]]:
    """Make the database; it is whole at the end, and closed."""
    connects = [
        DBConnect.from_url(s if isinstance(s, str) else s.url, pool_size=3, max_overflow=2)
        for s in (primary, replica)
    ]
    async with Replicated(*connects, secret=SECRET, secure=False, **options) as database:
        yield database
        for connect in connects:
            await until(partial(is_at_home, connect))
    assert [connect.engine for connect in connects] == [None, None]


def is_at_home(connect: DBConnect[Any]) -> bool:
    return connect.pool_status().checked_out == 0


def replica_of(database: Replicated[Any]) -> DBConnect[Any]:
    return database._replica


def engine_of(connect: DBConnect[Any]) -> AsyncEngine:
    assert connect.engine is not None
    return connect.engine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[AsyncEngine]:
    """Return the engines of the replicas that were asked, each time."""
    engines: list[AsyncEngine] = []
    original = _standby.ask

    async def ask(engine: AsyncEngine, question: TextClause) -> Any:
        engines.append(engine)
        return await original(engine, question)

    monkeypatch.setattr(_standby, "ask", ask)
    return engines


def app_of(database: DBConnect[Any], **options: Any) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app, **options)

    @app.post("/notes/{body}", status_code=201)
    async def add(body: str, status: int = 201) -> Response:
        await (await db_session(database)).execute(text(INSERT), {"body": body})
        return Response(status_code=status)

    @app.get("/notes")
    async def notes() -> list[Any]:
        return await read(database)

    return app


async def read(database: DBConnect[Any]) -> list[Any]:
    """Return who has answered, and what."""
    session = await db_session(database)
    return [await session.scalar(text(WHO)), list(await session.scalars(text(SELECT)))]


async def read_by(client: httpx.AsyncClient, path: str = "/notes") -> Any:
    response = await client.get(path)
    assert response.status_code == 200
    return response.json()


@pytest_asyncio.fixture
async def client(database: Replicated[Any]) -> AsyncGenerator[httpx.AsyncClient]:
    async with http_client(app_of(database)) as client:
        yield client


@asynccontextmanager
async def replay_paused(standby: Server) -> AsyncGenerator[None]:
    """Let the standby fall behind for a block."""
    await standby.fetch("SELECT pg_wal_replay_pause()")
    await until(lambda: standby.fetch(PAUSED))
    try:
        yield
    finally:
        await standby.fetch("SELECT pg_wal_replay_resume()")


def position_of(client: httpx.AsyncClient) -> int:
    header = f"{COOKIE}={client.cookies[COOKIE]}".encode()
    return PositionCookie(SECRET.encode(), COOKIE, 60, False).position([(b"cookie", header)])


def cookie_with(position: int, secret: str = SECRET, name: str = COOKIE, age: int = 60) -> str:
    _, header = PositionCookie(secret.encode(), name, age, False).header(position)
    return header.decode().partition(";")[0].replace(f"{name}=", f"{COOKIE}=")


# Who has written


async def test_who_has_written_reads_it_and_others_read_the_replica(
    database: Replicated[Any], client: httpx.AsyncClient, cluster: tuple[Server, Server]
) -> None:
    database._times = database._times._replace(patience=0.2)
    reader = httpx.AsyncClient(base_url=client.base_url)
    async with reader, replay_paused(cluster[1]):
        response = await client.post("/notes/milk")
        assert response.status_code == 201
        attributes = response.headers["set-cookie"].partition("; ")[2]
        assert attributes == "Max-Age=60; Path=/; HttpOnly; SameSite=Lax"
        assert await read_by(client) == ["primary", ["milk"]]
        assert await read_by(reader) == ["replica", []]
        assert COOKIE not in reader.cookies
    await until(lambda: cluster[1].fetch("SELECT FROM note"))
    assert await read_by(client) == ["replica", ["milk"]]


async def test_who_has_written_waits_for_a_replica_with_a_delay_and_holds_no_connection(
    database: Replicated[Any], client: httpx.AsyncClient, cluster: tuple[Server, Server]
) -> None:
    standby = cluster[1]
    await standby.fetch("ALTER SYSTEM SET recovery_min_apply_delay = '500ms'")
    await standby.fetch("SELECT pg_reload_conf()")
    database._times = database._times._replace(patience=20)
    try:
        begin = time.monotonic()
        assert (await client.post("/notes/milk")).status_code == 201
        requests = [asyncio.create_task(read_by(client)) for _ in range(30)]
        assert await asyncio.gather(*requests) == [["replica", ["milk"]]] * 30
        assert time.monotonic() - begin > 0.4
    finally:
        await standby.fetch("ALTER SYSTEM RESET recovery_min_apply_delay")
        await standby.fetch("SELECT pg_reload_conf()")


async def test_a_position_that_was_reached_is_not_asked_for_again(
    database: Replicated[Any], client: httpx.AsyncClient, asked: list[AsyncEngine]
) -> None:
    database._times = database._times._replace(patience=20, check_after=60)
    assert (await client.post("/notes/milk")).status_code == 201
    assert (await read_by(client))[0] == "replica"
    assert asked
    asked.clear()
    for _ in range(3):
        assert await read_by(client) == ["replica", ["milk"]]
    assert asked == []


async def test_what_a_replica_is_asked_is_no_query_of_the_request(
    database: Replicated[Any], asked: list[AsyncEngine]
) -> None:
    app = app_of(database)

    @app.get("/queries")
    async def queries() -> list[str]:
        async with count_queries() as queries:
            await read(database)
        return queries.statements

    async with http_client(app) as client:
        assert (await client.post("/notes/milk")).status_code == 201
        assert await read_by(client, "/queries") == [WHO, SELECT]
    assert asked


async def test_a_cookie_that_the_application_has_not_made_steers_nothing(
    database: Replicated[Any], client: httpx.AsyncClient
) -> None:
    database._times = database._times._replace(patience=30)
    good = cookie_with(UNKNOWN)
    of_others = [
        cookie_with(UNKNOWN, "the secret of another application"),
        cookie_with(UNKNOWN, name="another"),
        cookie_with(UNKNOWN, age=-1),
        good + "0",
        good.replace("=", "=1"),
        *(f"{COOKIE}={value}" for value in ("", "..", "ffffffffffffffff", "é.é.é", "x" * 5000)),
    ]
    begin = time.monotonic()
    for cookie in of_others:
        headers = {b"Cookie": f"a=b; {cookie}; c=d".encode()}
        assert (await client.get("/notes", headers=headers)).json() == ["replica", []], cookie
    assert time.monotonic() - begin < 30
    headers = {b"Cookie": f"a=b;{good}; {cookie}".encode()}
    assert (await client.get("/notes", headers=headers)).json() == ["primary", []]


async def test_a_position_that_is_never_reached_makes_nobody_wait_for_ever(
    database: Replicated[Any],
    client: httpx.AsyncClient,
    caplog: pytest.LogCaptureFixture,
    asked: list[AsyncEngine],
) -> None:
    database._times = database._times._replace(patience=0.2)
    # As after a failover to a server that had not got that far.
    client.headers["Cookie"] = cookie_with(UNKNOWN - 1)
    begin = time.monotonic()
    requests = [asyncio.create_task(read_by(client)) for _ in range(20)]
    assert {who for who, _ in await asyncio.gather(*requests)} == {"primary"}
    assert 0.2 <= time.monotonic() - begin < 10
    assert len(asked) < 20, "one asks for all"
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "The server 127.0.0.2 is behind: the primary is read instead"
    ]
    del client.headers["Cookie"]
    assert (await read_by(client))[0] == "replica"


async def test_a_refused_write_gives_a_position_and_an_unknown_outcome_the_primary(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.post("/notes/milk?status=409")).status_code == 409
    assert 0 < position_of(client) < UNKNOWN
    assert (await client.post("/notes/milk?status=503")).status_code == 503
    assert position_of(client) == UNKNOWN
    assert await read_by(client) == ["primary", []]


async def test_a_position_that_cannot_be_read_is_told_as_unknown(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from context_async_sqlalchemy import replicas

    monkeypatch.setattr(replicas, "_INSERTED", text("SELECT no_such_function()"))
    for _ in range(3):
        assert (await client.post("/notes/milk")).status_code == 201
    assert await read_by(client) == ["primary", ["milk"] * 3]
    assert position_of(client) == UNKNOWN
    [warning] = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "127.0.0.1 does not tell the position of a commit (ProgrammingError)" in warning


async def test_the_position_is_that_after_the_commit(
    database: Replicated[Any], cluster: tuple[Server, Server]
) -> None:
    app = app_of(database)
    after: list[int] = []

    async def note() -> None:
        [row] = await cluster[0].fetch("SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS int8)")
        after.append(row[0])

    @app.post("/")
    async def write() -> None:
        await (await db_session(database)).execute(text(INSERT), {"body": "milk"})
        on_commit(database, note)

    async with http_client(app) as client:
        await client.post("/")
        assert position_of(client) >= after[0] > 0


async def test_a_commit_after_the_response_is_not_in_the_position(
    database: Replicated[Any],
) -> None:
    app = app_of(database)

    @app.post("/late")
    async def late() -> StreamingResponse:
        commit_after_response()
        await (await db_session(database)).execute(text(INSERT), {"body": "late"})

        async def body() -> AsyncGenerator[str]:
            yield "late"

        return StreamingResponse(body())

    async with http_client(app) as client:
        await client.post("/late")
        assert position_of(client) == UNKNOWN


async def test_what_is_written_in_a_block_or_a_task_of_a_get_gives_a_position(
    database: Replicated[Any],
) -> None:
    app = app_of(database)

    async def write(body: str) -> None:
        await (await db_session(database)).execute(text(INSERT), {"body": body})

    @app.get("/block")
    async def block() -> list[Any]:
        before = await read(database)
        async with new_db_session_ctx():
            await write("block")
        return before

    @app.get("/task")
    async def task() -> None:
        await run_in_new_ctx(write, "task")

    @app.get("/callback")
    async def callback() -> None:
        await db_session(database)
        on_commit(database, lambda: write("callback"))

    for path in "block", "task", "callback":
        async with http_client(app) as client:
            assert (await client.get(f"/{path}")).status_code == 200
            assert path in (await read_by(client))[1]
            assert 0 < position_of(client) < UNKNOWN


# The decision


async def test_a_get_that_writes_is_an_error_that_names_it(
    database: Replicated[Any], cluster: tuple[Server, Server]
) -> None:
    app = app_of(database)
    errors: list[str] = []

    @app.exception_handler(InvalidRequestError)
    async def note(_: object, error: InvalidRequestError) -> Response:
        errors.append(str(error))
        return Response(status_code=500)

    @app.get("/write")
    async def write(read_only: bool | None = None) -> None:
        session = await db_session(database, read_only=read_only)
        await session.execute(text(INSERT), {"body": "secret"})

    async with http_client(app) as client:
        for path in "/write", "/write?read_only=true":
            assert (await client.get(path)).status_code == 500
        # So it is while there is no replica.
        client.headers["Cookie"] = cookie_with(UNKNOWN)
        assert (await client.get("/write")).status_code == 500
    instead = "Use 'with on_primary():' before the first session of the request"
    for error in errors:
        assert INSERT.partition("(")[0] in error
        assert instead in error
        assert "secret" not in error
    assert errors[0].startswith(
        "GET '/write' reads from the replica, and a statement writes or locks: "
    )
    assert errors[2].startswith(
        "GET '/write' reads from the replica, and a statement writes or locks: "
    )
    assert await cluster[0].fetch(SELECT) == []


async def test_a_get_may_write_on_the_primary(database: Replicated[Any]) -> None:
    app = app_of(database)

    def dependency() -> Generator[None]:  # runs in a thread
        with on_primary():
            yield

    @app.get("/with")
    async def inside() -> list[Any]:
        with on_primary():
            session = await db_session(database)
        await session.execute(text(INSERT), {"body": "with"})
        return await read(database)

    @app.get("/depends", dependencies=[Depends(dependency)])
    async def depends() -> list[Any]:
        async with atomic_db_session(database) as session:
            await session.execute(text(INSERT), {"body": "depends"})
        return await read(database)

    async with http_client(app) as client:
        assert await read_by(client, "/with") == ["primary", ["with"]]
        assert await read_by(client, "/depends") == ["primary", ["depends", "with"]]
        assert 0 < position_of(client) < UNKNOWN


async def test_a_context_that_reads_from_the_replica_does_not_change_its_mind(
    database: Replicated[Any],
) -> None:
    app = app_of(database)

    @app.get("/late")
    async def late() -> list[Any]:
        who, _ = await read(database)
        with pytest.raises(InvalidRequestError, match=r"^GET '/late' has begun to"), on_primary():
            pass
        await close_db_session(database)
        standby = Standby.of(engine_of(replica_of(database)))
        standby._pause_until = math.inf  # nobody else is sent there
        again, _ = await read(database)
        standby._pause_until = -math.inf
        return [who, again]

    @app.post("/report")
    async def report() -> list[Any]:
        with on_replica():
            elsewhere, _ = await run_in_new_ctx(read, database)
        here, _ = await read(database)
        with on_replica():
            still, _ = await read(database)
        return [elsewhere, here, still]

    async with http_client(app) as client:
        assert await read_by(client, "/late") == ["replica", "replica"]
        assert (await client.post("/report")).json() == ["replica", "primary", "primary"]


async def test_outside_of_a_request_it_is_the_primary_unless_told_otherwise(
    database: Replicated[Any],
) -> None:
    async with new_db_session_ctx():
        assert await read(database) == ["primary", []]
    assert (await run_in_new_ctx(read, database))[0] == "primary"
    async with new_non_ctx_session(database) as session:
        assert await session.scalar(text(WHO)) == "primary"
    with on_replica():
        assert (await run_in_new_ctx(read, database))[0] == "replica"
        with on_primary():
            assert (await run_in_new_ctx(read, database))[0] == "primary"
        with pytest.raises(InvalidRequestError, match=r"^A unit of work reads from the replica"):
            await run_in_new_ctx(write, database)


async def write(database: DBConnect[Any]) -> None:
    async with atomic_db_session(database) as session:
        await session.execute(text(INSERT), {"body": "tea"})


async def test_concurrent_first_calls_decide_once(
    database: Replicated[Any], cluster: tuple[Server, Server]
) -> None:
    app = app_of(database)

    @app.get("/gather")
    async def gather() -> list[Any]:
        sessions = await asyncio.gather(*(db_session(database) for _ in range(10)))
        readers = [db_session(database, read_only=mode) for mode in (True, "snapshot", False)]
        sessions += await asyncio.gather(*readers)
        return [len(set(sessions)), *{await session.scalar(text(WHO)) for session in sessions}]

    async with http_client(app) as client:
        assert await read_by(client, "/gather") == [3, "replica"]
        client.headers["Cookie"] = cookie_with(UNKNOWN)
        assert await read_by(client, "/gather") == [3, "primary"]


async def test_the_functions_of_a_context_take_it_for_a_connect(
    database: Replicated[Any], cluster: tuple[Server, Server]
) -> None:
    called: list[str] = []
    async with new_db_session_ctx():
        async with atomic_db_session(database) as session:
            assert session is await db_session(database)
            await session.execute(text(INSERT), {"body": "a"})
            on_commit(database, lambda: called.append("a"))
        assert called == ["a"]
        await session.execute(text(INSERT), {"body": "b"})
        await commit_db_session(database)
        assert len(await cluster[0].fetch(SELECT)) == 2
    await database.ping()
    await database.wait_until_ready(attempts=1)
    assert database.pool_status().checked_in == 1
    assert "Replicated" in repr(database)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(database)


async def test_read_only_methods_read_from_the_replica_in_one_round_trip(
    database: Replicated[Any],
) -> None:
    app = app_of(database, read_only_methods={"GET"})
    async with http_client(app) as client:
        assert await read_by(client) == ["replica", []]
        assert (await client.post("/notes/milk")).status_code == 201
        await until(lambda: read_by_replica(database))
        assert await read_by(client) == ["replica", ["milk"]]
    async with new_db_session_ctx():
        # The readers of the primary itself are others.
        with on_replica():
            session = await db_session(database._primary, read_only=True)
        assert await session.scalar(text(WHO)) == "primary"


async def read_by_replica(database: Replicated[Any]) -> bool:
    with on_replica():
        return bool((await run_in_new_ctx(read, database))[1])


async def test_a_dependency_takes_it_for_a_connect(database: Replicated[Any]) -> None:
    app = FastAPI()  # without the middleware
    dependency = DBSessionDependency(database)

    @app.api_route("/who", methods=["GET", "POST"])
    async def who(session: Annotated[Any, Depends(dependency)]) -> str:
        return str(await session.scalar(text(WHO)))

    async with http_client(app) as client:
        assert (await client.get("/who")).json() == "replica"
        assert COOKIE not in client.cookies
        assert (await client.post("/who")).json() == "primary"
        assert 0 < position_of(client) < UNKNOWN


async def test_a_dispatch_function_which_sees_no_response_is_refused(
    database: Replicated[Any],
) -> None:
    app = FastAPI()
    app.middleware("http")(fastapi_http_db_session_middleware)
    errors: list[str] = []

    @app.get("/")
    async def ask() -> None:
        try:
            await db_session(database)
        except RuntimeError as error:
            errors.append(str(error))

    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 200
    [error] = errors
    assert "add_fastapi_http_db_session_middleware(app)" in error


async def test_a_test_sees_what_a_request_would(
    database: Replicated[Any], client: httpx.AsyncClient, cluster: tuple[Server, Server]
) -> None:
    async with shared_transaction(database) as session:
        assert (await client.post("/notes/milk")).status_code == 201
        assert await read_by(client) == ["primary", ["milk"]]
        assert list(await session.scalars(text(SELECT))) == ["milk"]
    assert await cluster[0].fetch(SELECT) == []
    async with set_test_context():
        assert await read(database) == ["primary", []]


# A replica that does not serve


async def test_a_replica_that_is_down_at_the_first_request_costs_one_warning(
    cluster: tuple[Server, Server], caplog: pytest.LogCaptureFixture
) -> None:
    nobody = f"postgresql://postgres@127.0.0.1:{free_port()}/postgres"
    async with made(cluster[0], nobody) as database, http_client(app_of(database)) as client:
        answers = await asyncio.gather(*(read_by(client) for _ in range(20)))
        assert answers == [["primary", []]] * 20
        assert (await client.post("/notes/milk")).status_code == 201
        assert await read_by(client) == ["primary", ["milk"]]
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "The server 127.0.0.1 does not answer (ConnectionRefusedError): the primary is read instead"
    ]


async def test_a_replica_that_says_nothing_is_not_waited_for_long(
    cluster: tuple[Server, Server], asked: list[AsyncEngine]
) -> None:
    async with (
        made(*cluster, timeout=0.8, check_after=0.001, retry_after=60) as database,
        http_client(app_of(database)) as client,
    ):
        assert (await read_by(client))[0] == "replica"
        asked.clear()
        with frozen(cluster[1]):
            begin = time.monotonic()
            assert (await read_by(client))[0] == "primary"
            assert 0.8 <= time.monotonic() - begin < 10
            assert (await read_by(client))[0] == "primary"
            assert len(asked) == 1, "nobody asks it now"
        Standby.of(engine_of(replica_of(database)))._pause_until = -math.inf  # that time is over

        async def is_back() -> bool:
            return bool((await read_by(client))[0] == "replica")

        await until(is_back)


async def test_a_request_whose_replica_dies_is_repeated_on_the_primary(
    cluster: tuple[Server, Server],
) -> None:
    _, standby = cluster
    async with made(*cluster, check_after=60) as database:
        app = app_of(database, attempts=2)
        tries: list[str] = []

        @app.get("/dies")
        async def dies() -> list[Any]:
            who, _ = await read(database)
            tries.append(who)
            if len(tries) == 1:
                await asyncio.to_thread(standby.kill)
            return await read(database)

        try:
            async with http_client(app) as client:
                assert await read_by(client, "/dies") == ["primary", []]
                assert tries == ["replica", "primary"]
            async with http_client(app_of(database)) as client:
                # The connection that was lost has told that it is down.
                assert (await read_by(client))[0] == "primary"
        finally:
            await asyncio.to_thread(standby.start)


async def test_a_conflict_with_the_replay_is_repeated_on_the_primary(
    database: Replicated[Any],
) -> None:
    app = app_of(database, attempts=2)
    conflict = "DO $$ BEGIN RAISE 'conflict with recovery' USING ERRCODE = '40001'; END $$"

    @app.get("/conflict")
    async def answer() -> list[Any]:
        who, _ = await read(database)
        if who == "replica":
            await (await db_session(database)).execute(text(conflict))
        return await read(database)

    async with http_client(app) as client:
        assert await read_by(client, "/conflict") == ["primary", []]


async def test_reads_that_no_replica_serves_leave_the_primary_to_those_who_write(
    cluster: tuple[Server, Server],
) -> None:
    primary, _ = cluster
    fallback = DBConnect.from_url(primary.url, pool_size=2, max_overflow=0, pool_timeout=0.2)
    async with made(*cluster, fallback=fallback) as database:
        app = app_of(database)
        add_database_exception_handlers(app)
        async with http_client(app) as client:
            client.headers["Cookie"] = cookie_with(UNKNOWN)
            async with new_db_session_ctx():
                await (await db_session(database)).execute(text("LOCK TABLE note"))
                requests = [asyncio.create_task(client.get("/notes")) for _ in range(20)]
                await until(lambda: sum(request.done() for request in requests) == 18)
                await database.ping()
            statuses = [response.status_code for response in await asyncio.gather(*requests)]
            assert sorted(statuses) == [200] * 2 + [503] * 18
        assert fallback.engine is not None
    assert fallback.engine is None


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_the_connections_of_another_replica_stay_as_they_were(
    cluster: tuple[Server, Server], driver: str
) -> None:
    # READ WRITE, which a transaction must not ask for there.
    url = make_url(cluster[1].url).set(drivername=f"postgresql+{driver}")
    fallback = DBConnect.from_url(url, pool_size=1, max_overflow=0)
    async with made(*cluster, fallback=fallback) as database:
        async with http_client(app_of(database)) as client:
            client.headers["Cookie"] = cookie_with(UNKNOWN)
            for _ in range(2):
                await read_by(client)
        async with new_db_session_ctx():
            assert await read(fallback)


async def test_either_connect_may_change_its_host(
    database: Replicated[Any], client: httpx.AsyncClient, cluster: tuple[Server, Server]
) -> None:
    primary, standby = cluster
    assert (await read_by(client))[0] == "replica"
    await replica_of(database).change_host(primary.host)
    assert (await read_by(client))[0] == "primary"
    await replica_of(database).change_host(standby.host)
    assert (await read_by(client))[0] == "replica"
    await database.change_host(standby.host)
    assert database._primary.host == standby.host
    assert (await client.post("/notes/tea")).status_code == 500
    await database.change_host(primary.host)
    assert (await client.post("/notes/tea")).status_code == 201


async def test_a_replica_that_is_promoted_while_one_waits_answers(
    cluster: tuple[Server, Server],
) -> None:
    primary, _ = cluster
    standby = await asyncio.to_thread(copy_of, primary, "127.0.0.3")
    try:
        await asyncio.to_thread(standby.start)
        async with (
            made(primary, standby, patience=20) as database,
            http_client(app_of(database)) as client,
        ):
            assert (await read_by(client))[0] == "replica"
            # Further than the log of any server.
            client.headers["Cookie"] = cookie_with(UNKNOWN - 1)
            request = asyncio.create_task(read_by(client))
            await until(lambda: Standby.of(engine_of(replica_of(database)))._asking)
            await asyncio.to_thread(standby.promote)
            assert await request == ["primary", []]
            with pytest.raises(InvalidRequestError, match="a statement writes"), on_replica():
                await run_in_new_ctx(write, database)
    finally:
        await asyncio.to_thread(standby.end)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"secret": "short"}, ValueError), ({"secret": SECRET, "replica": None}, TypeError)],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    connect = DBConnect.from_url("postgresql://a@b/c")
    with pytest.raises(error):
        Replicated(connect, **{"replica": connect, **options})
