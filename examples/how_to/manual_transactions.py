"""Orders that are committed, rolled back or closed before the request ends."""

import logging
import os

from fastapi import FastAPI, HTTPException
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    rollback_db_session,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///orders.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "charged_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]
    state: Mapped[str]


class Attempt(Base):
    __tablename__ = "order_attempt"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


async def charge(article: str) -> str:
    logging.info("%s is charged", article)  # call your payment service here
    return "paid"


@app.post("/orders/{article}", status_code=201)
async def place_order(article: str) -> str:
    async with new_non_ctx_atomic_session(connect) as audit:
        audit.add(Attempt(article=article))
    session = await db_session(connect)
    order = Order(article=article, state="new")
    session.add(order)
    await commit_db_session(
        connect
    )  # durable; the connection is back in the pool
    order.state = await charge(order.article)
    return (
        order.state
    )  # the middleware commits the change in a second transaction


@app.get("/orders/{order_id}")
async def show_order(order_id: int) -> str:
    session = await db_session(connect)
    order = await session.get_one(Order, order_id)
    await close_db_session(
        connect
    )  # a query opens a transaction too, and holds a connection
    return f"{order.article}: {order.state}, {await locate(order.id)}"


async def locate(order_id: int) -> str:
    logging.info("%s is looked for", order_id)  # call your parcel service here
    return "on its way"


@app.post("/orders", status_code=201)
async def place_orders(articles: list[str]) -> None:
    """Stop at what is not for sale: the orders before it stay."""
    for article in articles:
        async with atomic_db_session(connect) as session:
            session.add(Order(article=article, state="new"))
            if article == "the moon":
                raise HTTPException(422, f"{article} is not for sale")


@app.post("/orders/{article}/check", status_code=204)
async def check_order(article: str) -> None:
    """Have the database check an order; store only that it was asked for."""
    session = await db_session(connect)
    session.add(Order(article=article, state="new"))
    await session.flush()
    await rollback_db_session(connect)
    session.add(Attempt(article=article))
