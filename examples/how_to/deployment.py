"""An application served by several processes, and stopped while requests are in flight."""

import os

from fastapi import FastAPI
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"),
    pool_size=4,
    max_overflow=0,
    pool_timeout=3,
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "order"

    number: Mapped[int] = mapped_column(primary_key=True)


app = FastAPI(lifespan=database_lifespan(connect, wait=True))
add_fastapi_http_db_session_middleware(app)


@app.post("/orders/{number}", status_code=201)
async def take_order(number: int) -> dict[str, int]:
    session = await db_session(connect)
    session.add(Order(number=number))
    return {"number": number, "process": os.getpid()}
