"""An order in one database and its bookkeeping in another."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from sqlalchemy import ForeignKey, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    on_commit,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///shop.db")
LEDGER_URL = os.environ.get("LEDGER_URL", "sqlite:///ledger.db")
shop = DBConnect.from_url(DATABASE_URL)
ledger = DBConnect.from_url(LEDGER_URL)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"

    number: Mapped[int] = mapped_column(primary_key=True)


class Unbooked(Base):
    __tablename__ = "unbooked_order"

    number: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str]


class LedgerBase(DeclarativeBase):
    pass


class Account(LedgerBase):
    __tablename__ = "account"

    name: Mapped[str] = mapped_column(primary_key=True)


class Entry(LedgerBase):
    __tablename__ = "entry"

    number: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(
        ForeignKey(
            Account.name, deferrable=True, initially="DEFERRED"
        )  # checked by the COMMIT
    )


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with shop, ledger:
        async with new_db_session_ctx():
            session = await db_session(shop)
            await (await session.connection()).run_sync(
                Base.metadata.create_all
            )
            session = await db_session(ledger)
            await (await session.connection()).run_sync(
                LedgerBase.metadata.create_all
            )
            await session.merge(Account(name="sales"))
        yield


async def log_commit(session: AsyncSession) -> None:
    bind = session.get_bind()
    logging.info("about to commit %s", bind.engine.url.database)


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app, before_commit=log_commit)


@app.post("/orders/{number}/{account}", status_code=201)
async def place_order(number: int, account: str) -> None:
    in_shop = await db_session(shop)
    in_ledger = await db_session(ledger)
    in_shop.add(Order(number=number))
    in_ledger.add(Entry(number=number, account=account))
    on_commit(shop, partial(logging.info, "order %s is placed", number))
    on_commit(ledger, partial(logging.info, "order %s is booked", number))


@app.post("/later/orders/{number}/{account}", status_code=201)
async def place_order_and_book_it_later(number: int, account: str) -> None:
    session = await db_session(shop)
    session.add(Order(number=number))
    session.add(Unbooked(number=number, account=account))


async def book() -> list[int]:
    """Book the waiting orders; return those that the ledger refuses."""
    async with new_db_session_ctx():
        waiting = (
            await (await db_session(shop)).scalars(select(Unbooked.number))
        ).all()
    refused = []
    for number in waiting:
        try:
            await run_in_new_ctx(book_one, number)
        except IntegrityError:
            refused.append(number)
    return refused


async def book_one(number: int) -> None:
    in_ledger = await db_session(ledger)  # requested first: committed first
    in_shop = await db_session(shop)
    order = await in_shop.get(Unbooked, number, with_for_update=True)
    if order is not None:  # not booked by another run meanwhile
        await in_ledger.merge(Entry(number=number, account=order.account))
        await in_shop.delete(order)
