"""Sensor readings, as streamed responses."""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    commit_after_response,
    commit_db_session,
    db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///readings.db")
connect = DBConnect.from_url(DATABASE_URL)
PAGE = 100


class Base(DeclarativeBase):
    pass


class Reading(Base):
    __tablename__ = "sensor_reading"

    id: Mapped[int] = mapped_column(primary_key=True)
    sensor: Mapped[str]
    value: Mapped[str]


def as_csv(readings: Sequence[Reading]) -> str:
    return "".join(f"{reading.id},{reading.value}\n" for reading in readings)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


async def newer_than(last: int) -> Sequence[Reading]:
    session = await db_session(connect)
    readings = (
        select(Reading)
        .where(Reading.id > last)
        .order_by(Reading.id)
        .limit(PAGE)
    )
    return (await session.scalars(readings)).all()


async def pages() -> AsyncGenerator[str]:
    last = 0
    while readings := await newer_than(last):
        await commit_db_session(
            connect
        )  # no connection is held while the client reads
        yield as_csv(readings)
        last = readings[-1].id


@app.get("/readings.csv")
async def export() -> StreamingResponse:
    return StreamingResponse(pages(), media_type="text/csv")


async def taken_out() -> AsyncGenerator[str]:
    session = await db_session(connect)
    while readings := await newer_than(0):
        for reading in readings:
            await session.delete(reading)
        await session.flush()
        yield as_csv(readings)


@app.delete("/readings.csv")
async def take_out() -> StreamingResponse:
    return StreamingResponse(taken_out(), media_type="text/csv")


@app.get("/sensors/{sensor}.csv")
async def export_sensor(sensor: str) -> StreamingResponse:
    commit_after_response()
    session = await db_session(connect)
    query = select(Reading).where(Reading.sensor == sensor).order_by(Reading.id)
    cursor = await session.stream_scalars(query)
    first = await cursor.fetchmany(1)
    if not first:
        raise HTTPException(404)

    async def body() -> AsyncGenerator[str]:
        yield as_csv(first)
        async for reading in cursor:
            yield as_csv([reading])

    return StreamingResponse(body(), media_type="text/csv")


async def events(last: int) -> AsyncGenerator[str]:
    while True:
        for reading in await run_in_new_ctx(newer_than, last):
            yield f"id: {reading.id}\ndata: {reading.value}\n\n"
            last = reading.id
        await asyncio.sleep(0.1)


@app.get("/events")
async def follow(
    last: Annotated[int, Query(ge=0, lt=2**31)] = 0,
) -> StreamingResponse:
    return StreamingResponse(events(last), media_type="text/event-stream")
