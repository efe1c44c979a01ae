"""A commit after the response: the client may see a success that was not stored."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from examples.why.database import Booking, connect, lifespan, session_maker


async def get_session() -> AsyncGenerator[AsyncSession]:
    async with session_maker() as session:
        yield session
        await session.commit()


Session = Annotated[AsyncSession, Depends(get_session)]

before = FastAPI(lifespan=lifespan)


@before.post("/bookings/{seat}", status_code=201)
async def book(seat: str, session: Session) -> None:
    session.add(Booking(seat=seat))


after = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(after)


@after.post("/bookings/{seat}", status_code=201)
async def book_with_context(seat: str) -> None:
    session = await db_session(connect)
    session.add(Booking(seat=seat))
