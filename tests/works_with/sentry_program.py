"""An application that Sentry watches: in a process of its own, for Sentry changes Starlette.

Prints for each request its status, and the errors that Sentry was told.
"""

from __future__ import annotations

import asyncio
import sys

import sentry_sdk
from fastapi import FastAPI
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.fastapi import FastApiIntegration
from sentry_sdk.integrations.sqlalchemy import SqlalchemyIntegration
from sentry_sdk.integrations.starlette import StarletteIntegration
from sentry_sdk.transport import Transport
from sqlalchemy import insert

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.models import Item, Seat
from tests.helpers.serving import http_client

told: list[str] = []


class Telling(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        if (event := envelope.get_event()) is not None:
            told.append(event["exception"]["values"][-1]["type"])


def make_app(connect: DBConnect, name: str) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.post("/{outcome}")
    async def post(outcome: str) -> None:
        session = await db_session(connect)
        await session.execute(insert(Item).values(name=f"{name} {outcome}"))
        if outcome == "raises":
            raise RuntimeError
        if outcome == "fails":  # in the commit
            await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])

    return app


async def main(url: str) -> None:
    connect = DBConnect.from_url(url)
    before = make_app(connect, "before")
    # The integrations that it finds by itself, without those of every other package.
    integrations = [StarletteIntegration(), FastApiIntegration(), SqlalchemyIntegration()]
    sentry_sdk.init(
        "http://key@127.0.0.1:1/1",
        transport=Telling,
        traces_sample_rate=1,
        auto_enabling_integrations=False,
        integrations=integrations,
    )
    for app in before, make_app(connect, "after"):
        async with connect, http_client(app, log_level="critical") as client:
            for outcome in "succeeds", "raises", "fails":
                response = await client.post(f"/{outcome}")
                print(outcome, response.status_code, *told)
                told.clear()


asyncio.run(main(*sys.argv[1:]))
