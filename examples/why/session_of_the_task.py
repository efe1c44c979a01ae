"""A session for each task: nobody commits what a child task writes."""

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Depends, FastAPI
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import async_scoped_session

from context_async_sqlalchemy import db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from examples.why.database import Booking, connect, lifespan, session_maker


async def charge() -> None:
    """Call the bank, which takes its time."""


scoped_session = async_scoped_session(
    session_maker, scopefunc=asyncio.current_task
)


async def transaction() -> AsyncGenerator[None]:
    try:
        yield
        await scoped_session.commit()
    finally:
        await scoped_session.remove()


before = FastAPI(lifespan=lifespan, dependencies=[Depends(transaction)])


async def reserve(seat: str) -> None:
    await scoped_session.execute(insert(Booking).values(seat=seat))


@before.post("/bookings/{seat}", status_code=201)
async def book(seat: str) -> None:
    reserving = asyncio.create_task(reserve(seat))
    await charge()  # meanwhile
    await reserving


after = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(after)


async def reserve_with_context(seat: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Booking).values(seat=seat))


@after.post("/bookings/{seat}", status_code=201)
async def book_with_context(seat: str) -> None:
    reserving = asyncio.create_task(reserve_with_context(seat))
    await charge()  # meanwhile
    await reserving
