"""The application that real servers serve in their own processes.

The environment variable `SERVED_DATABASE_URL` names its database.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_utils import RequestLimitsMiddleware
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.connections import connections_out
from tests.helpers.models import Item, Seat


def create_engine(_: str) -> AsyncEngine:
    return create_async_engine(os.environ["SERVED_DATABASE_URL"])


connect = DBConnect(create_engine, async_sessionmaker, host="that of the URL")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    yield
    await connect.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app, attempts=3)
app.add_middleware(RequestLimitsMiddleware, cancel_on_disconnect={"GET"})
attempts = Counter[str]()


async def add(name: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Item).values(name=name))


@app.get("/asleep")
async def sleep() -> None:
    session = await db_session(connect)
    await session.execute(text("SELECT pg_sleep(30)"))


@app.post("/{name}", status_code=201)
async def succeed(name: str) -> None:
    await add(name)


@app.post("/{name}/refused")
async def refuse(name: str) -> None:
    await add(name)
    raise HTTPException(404)


@app.post("/{name}/raised")
async def stumble(name: str) -> None:
    await add(name)
    raise RuntimeError("stumbled")


@app.post("/{name}/uncommittable")
async def fail_to_commit(name: str) -> None:
    await add(name)
    session = await db_session(connect)
    await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])


@app.post("/{name}/streamed")
async def stream(name: str) -> StreamingResponse:
    async def body() -> AsyncGenerator[str]:
        for part in "12":
            await add(f"{name} {part}")
            yield part

    await add(name)
    return StreamingResponse(body())


@app.post("/{name}/endless")
async def stream_without_end(name: str) -> StreamingResponse:
    async def body() -> AsyncGenerator[str]:
        number = 0
        while True:
            number += 1
            await add(f"{name} {number}")
            yield f"{number}\n"
            # Long enough for most hang-ups to happen here, in an open transaction. In a statement,
            # each would cost a connection, and SQLAlchemy 2.1 keeps a finalizer of those.
            await asyncio.sleep(0.05)

    await add(name)
    return StreamingResponse(body())


@app.post("/{name}/background", status_code=202)
async def write_in_background(name: str, background: BackgroundTasks) -> None:
    await add(name)
    background.add_task(add, f"{name} later")


@app.post("/{name}/again")
async def succeed_in_the_end(name: str, request: Request) -> Response:
    attempts[name] += 1
    await add(name)
    if attempts[name] < 3:
        session = await db_session(connect)
        await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
    return Response(await request.body())


@app.get("/stats")
async def stats() -> dict[str, int]:
    return {
        "pid": os.getpid(),
        "tasks": len(asyncio.all_tasks()),
        "connections_out": connections_out(connect),
    }
