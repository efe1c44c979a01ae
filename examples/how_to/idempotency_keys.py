"""Payments that a client may send again if it got no answer, each of which is done once."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import stamina
from fastapi import FastAPI
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.datastructures import Headers

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from context_async_sqlalchemy.idempotency import (
    IdempotencyMiddleware,
    delete_expired_keys,
    idempotency_table,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///payments.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


keys = idempotency_table(Base.metadata)


async def delete_keys_each_hour() -> None:
    while True:
        await delete_expired_keys(connect, keys)
        await asyncio.sleep(3600)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with database_lifespan(connect, create_tables=Base.metadata)(app):
        deleting = asyncio.create_task(delete_keys_each_hour())
        yield
        deleting.cancel()
        await asyncio.wait([deleting])


def token_of(scope: Scope) -> str:
    return Headers(scope=scope).get("authorization", "")


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    IdempotencyMiddleware,
    connect=connect,
    table=keys,
    caller=token_of,
    required=True,
)
add_fastapi_http_db_session_middleware(app)  # after it, and so around it


@app.post("/payments", status_code=201)
async def pay(amount: int) -> dict[str, int]:
    session = await db_session(connect)
    payment = Payment(amount=amount)
    session.add(payment)
    await session.flush()
    return {"payment": payment.id}


# A client


async def send_payment(client: httpx.AsyncClient, amount: int) -> Any:
    """Pay once, however often it takes to learn that it is done."""
    key = str(uuid4())  # one for a payment, not for an attempt

    @stamina.retry(on=is_to_be_sent_again, attempts=5)
    async def send() -> httpx.Response:
        headers = {"Idempotency-Key": key}
        response = await client.post(
            f"/payments?amount={amount}", headers=headers
        )
        return response.raise_for_status()

    return (await send()).json()


def is_to_be_sent_again(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return (
            error.response.status_code == 409
            or error.response.status_code >= 500
        )
    return isinstance(error, httpx.TransportError)  # no answer
