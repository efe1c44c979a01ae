"""A middleware that commits: it stores what a handler refused."""

from fastapi import FastAPI, HTTPException, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import RequestResponseEndpoint

from context_async_sqlalchemy import db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from examples.why.database import Booking, connect, lifespan, session_maker

before = FastAPI(lifespan=lifespan)


@before.middleware("http")
async def commit_or_roll_back(
    request: Request, call_next: RequestResponseEndpoint
) -> Response:
    async with (
        session_maker() as session,
        session.begin(),
    ):  # an exception rolls back
        request.state.session = session
        return await call_next(request)


@before.post("/bookings/{seat}", status_code=201)
async def book(seat: str, request: Request) -> None:
    session: AsyncSession = request.state.session
    session.add(Booking(seat=seat))
    raise HTTPException(402, "the card is refused")


after = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(after)


@after.post("/bookings/{seat}", status_code=201)
async def book_with_context(seat: str) -> None:
    session = await db_session(connect)
    session.add(Booking(seat=seat))
    raise HTTPException(402, "the card is refused")
