"""A slow client: it holds a connection for as long as it reads."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
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


async def recording() -> AsyncGenerator[bytes]:
    for _ in range(16):  # 16 MiB, more than the socket buffers hold
        yield bytes(1024 * 1024)


before = FastAPI(lifespan=lifespan)


@before.get("/bookings/{seat}/recording")
async def download(seat: str, session: Session) -> StreamingResponse:
    if await session.get(Booking, seat) is None:
        raise HTTPException(403)
    return StreamingResponse(recording())


after = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(after)


@after.get("/bookings/{seat}/recording")
async def download_with_context(seat: str) -> StreamingResponse:
    session = await db_session(connect)
    if await session.get(Booking, seat) is None:
        raise HTTPException(403)
    return StreamingResponse(recording())
