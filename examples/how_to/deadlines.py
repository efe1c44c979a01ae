"""Reports that take too long are stopped, and those that nobody waits for."""

import os

from fastapi import Depends, FastAPI
from sqlalchemy import text

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_utils import (
    RequestLimitsMiddleware,
    deadline_settings,
    set_deadline,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"
)
connect = DBConnect.from_url(
    DATABASE_URL, transaction_settings=deadline_settings
)


app = FastAPI(lifespan=database_lifespan(connect))
add_fastapi_http_db_session_middleware(app)
app.add_middleware(
    RequestLimitsMiddleware, timeout=2.0, cancel_on_disconnect={"GET", "HEAD"}
)  # added last, so it is around the other


async def take_your_time() -> None:
    set_deadline(60)


@app.get("/reports/{seconds}")
@app.get("/long-reports/{seconds}", dependencies=[Depends(take_your_time)])
async def report(seconds: float) -> str:
    session = await db_session(connect)
    await session.execute(
        text("SELECT pg_sleep(:seconds)"), {"seconds": seconds}
    )
    return "done"
