"""No line of the log is forged, and no terminal driven, by what a client or an error says."""

from __future__ import annotations

import logging
from collections.abc import Generator
from io import StringIO
from typing import Any

import pytest
from sqlalchemy import URL, insert, text
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from context_async_sqlalchemy.starlette_utils import (
    add_database_exception_handlers,
    add_starlette_http_db_session_middleware,
    database_health,
)
from tests.helpers.asgi import app_of, call, http_scope, respond
from tests.helpers.database import Database
from tests.helpers.failures import ConflictError
from tests.helpers.models import Item
from tests.helpers.programs import until
from tests.helpers.serving import http_client

# A line break of each kind, the escapes of a terminal (also as one byte), and one that turns text.
FORGED = "a\r\nERROR forged\x0b\x1b[2J\x9b2J\x7f\x85\u2028\u202eb"
SHOWN = r"a\r\nERROR forged\x0b\x1b[2J\x9b2J\x7f\x85\u2028\u202eb"


class Log(StringIO):
    """What a handler of the application writes."""

    def only_line(self) -> str:
        """Return the only line, which has no control character."""
        line = self.getvalue().removesuffix("\n")
        assert line.isprintable()
        return line


@pytest.fixture
def log() -> Generator[Log]:
    """Log at INFO, as an application does."""
    logger, stream = logging.getLogger("context_async_sqlalchemy"), Log()
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


async def lose(_: Request) -> Response:
    raise OperationalError("SELECT 1", {}, OSError(FORGED), connection_invalidated=True)


async def test_the_text_of_an_error_that_is_answered(log: Log) -> None:
    app = Starlette(routes=[Route("/", lose)])
    add_database_exception_handlers(app)
    assert (await call(app))[0]["status"] == 503
    assert log.only_line().endswith(f"answered with 503: OperationalError: {SHOWN}")


async def test_what_a_client_made_the_database_say(
    connect: DBConnect, database: Database, log: Log
) -> None:
    async def endpoint(request: Request) -> Response:
        said = request.query_params["name"].replace("'", "''")
        session = await db_session(connect)
        await session.execute(text(f"DO $$ BEGIN RAISE '{said}' USING ERRCODE = '40001'; END $$"))
        return JSONResponse({})

    app = Starlette(routes=[Route("/", endpoint)])
    add_starlette_http_db_session_middleware(app)
    add_database_exception_handlers(app)
    async with http_client(app) as client:
        assert (await client.get("/", params={"name": FORGED})).status_code == 409
    assert SHOWN in log.only_line()


async def test_the_reason_of_a_database_that_is_not_healthy(log: Log) -> None:
    async def refuse() -> Any:
        raise OSError(FORGED)

    async with DBConnect.from_url("postgresql://db/shop", async_creator=refuse) as connect:
        health: Any = database_health(connect)
        assert (await health(None)).status_code == 503
        assert log.only_line().endswith(f"OSError: {SHOWN}")
        log.truncate(log.seek(0))
        with pytest.raises(OSError, match="forged"):
            await connect.wait_until_ready(attempts=1)
        assert log.only_line().endswith(f"OSError: {SHOWN}")


# hypercorn passes on such a method: HTTP/2 forbids few characters, and the library h2 lets them by.
FORGED_SCOPE = {**http_scope(FORGED), "method": FORGED}


async def test_the_method_of_a_request_that_holds_a_connection(
    database_url: URL, database: Database, log: Log
) -> None:
    async with DBConnect.from_url(database_url, leak_detection_threshold=0.001) as connect:

        async def handler(_: Scope) -> int:
            await (await db_session(connect)).execute(text("SELECT 1"))
            await until(lambda: "has been held" in log.getvalue())
            return 200

        await call(app_of(handler), dict(FORGED_SCOPE))
    assert f"by the request {SHOWN} '{SHOWN}'" in log.only_line()


async def test_the_method_of_a_request_whose_work_is_undone(
    connect: DBConnect, database: Database, log: Log
) -> None:
    async def handler(_: Scope) -> int:
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="a"))
        return 409

    await call(app_of(handler), dict(FORGED_SCOPE))
    assert f"({SHOWN} '{SHOWN}'): rows: 1," in log.only_line()


async def test_the_method_of_a_request_that_fails_after_its_response(
    connect: DBConnect, database: Database, log: Log
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)
        await (await db_session(connect)).execute(text("SELECT 1"))
        raise ConflictError

    with pytest.raises(ConflictError):
        await call(ASGIHTTPDBSessionMiddleware(app), dict(FORGED_SCOPE))
    assert SHOWN in log.only_line()


async def test_the_method_of_a_request_to_a_mounted_application(log: Log) -> None:
    async def handler(_: Scope) -> int:
        return 200

    inner = app_of(handler, attempts=2)
    await call(ASGIHTTPDBSessionMiddleware(inner), dict(FORGED_SCOPE))
    assert SHOWN in log.only_line()


@pytest.mark.usefixtures("no_pauses")
async def test_the_error_of_an_attempt(caplog: pytest.LogCaptureFixture) -> None:
    app = Starlette(routes=[Route("/", lose)])
    add_starlette_http_db_session_middleware(app, attempts=2)
    with pytest.raises(OperationalError), caplog.at_level(logging.WARNING, "stamina"):
        await call(app)
    records = [record for record in caplog.records if record.name == "stamina"]
    assert SHOWN in vars(records[0])["stamina.caused_by"]
    assert all(str(value).isprintable() for record in records for value in vars(record).values())


def test_what_is_no_control_character_is_logged_as_it_is(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = "50 %", 7, r"Имя \n 名前 🙂"
    logging.getLogger("context_async_sqlalchemy").warning("%s of %d: %s", *arguments)
    assert log.only_line() == r"50 % of 7: Имя \n 名前 🙂"
    # Those who group by the message, or read the arguments, still can.
    [record] = caplog.records
    assert (record.msg, record.args) == ("%s of %d: %s", arguments)


def test_a_percent_sign_beside_a_control_character_is_no_place_for_an_argument(log: Log) -> None:
    logging.getLogger("context_async_sqlalchemy").warning("%s", "50 %s\n'\udc80")
    assert log.only_line() == r"50 %s\n'\udc80"
