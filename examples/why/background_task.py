"""A background task on the session of the request: if it fails, the booking is lost."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import db_session
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


async def get_session() -> AsyncGenerator[AsyncSession]:
    async with session_maker() as session:
        yield session
        await session.commit()


Session = Annotated[AsyncSession, Depends(get_session)]


def send_ticket(name: str) -> None:
    raise ConnectionError(f"no mail server for {name}")


before = FastAPI(lifespan=lifespan)


async def welcome(session: AsyncSession, name: str) -> None:
    session.add(Guest(name=name))
    send_ticket(name)


@before.post("/bookings/{seat}/{name}", status_code=201)
async def book(
    seat: str, name: str, session: Session, background: BackgroundTasks
) -> None:
    session.add(Booking(seat=seat))
    background.add_task(welcome, session, name)


after = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(after)


async def welcome_with_context(name: str) -> None:
    session = await db_session(connect)
    session.add(Guest(name=name))
    send_ticket(name)


@after.post("/bookings/{seat}/{name}", status_code=201)
async def book_with_context(
    seat: str, name: str, background: BackgroundTasks
) -> None:
    session = await db_session(connect)
    session.add(Booking(seat=seat))
    background.add_task(welcome_with_context, name)
