"""A failed statement that is swallowed: PostgreSQL answers the COMMIT with a ROLLBACK."""

from contextlib import suppress

from fastapi import FastAPI
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import atomic_db_session, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from examples.why.database import (
    Booking,
    Guest,
    connect,
    lifespan,
    session_maker,
)

before = FastAPI(lifespan=lifespan)


@before.post("/bookings/{seat}/{name}", status_code=201)
async def book(seat: str, name: str) -> None:
    async with session_maker() as session, session.begin():
        await session.execute(insert(Booking).values(seat=seat))
        with suppress(IntegrityError):  # the guest is known already
            await session.execute(insert(Guest).values(name=name))


after = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(after)


@after.post("/bookings/{seat}/{name}", status_code=201)
async def book_with_context(seat: str, name: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Booking).values(seat=seat))
    with suppress(IntegrityError):  # the guest is known already
        await session.execute(insert(Guest).values(name=name))


@after.post("/bookings/{seat}/{name}/with-savepoint", status_code=201)
async def book_with_savepoint(seat: str, name: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Booking).values(seat=seat))
    with suppress(IntegrityError):  # the guest is known already
        async with atomic_db_session(connect, "savepoint"):
            await session.execute(insert(Guest).values(name=name))
