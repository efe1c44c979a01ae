"""A queue worker: each message is a unit of work, sent once its row is committed."""

import asyncio
import os
from functools import partial

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from taskiq import InMemoryBroker, TaskiqEvents, TaskiqState

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    on_commit,
    retry_on_transient_error,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///orders.db")
connect = DBConnect.from_url(DATABASE_URL)
broker = InMemoryBroker()


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "customer_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]
    packed: Mapped[bool] = mapped_column(default=False)


@broker.task
@retry_on_transient_error(attempts=5)
async def pack(order_id: int) -> None:
    session = await db_session(connect)
    order = await session.get_one(Order, order_id)
    order.packed = True


async def place_order(article: str) -> None:
    session = await db_session(connect)
    order = Order(article=article)
    session.add(order)
    await session.flush()  # gives the order its id
    on_commit(connect, partial(pack.kiq, order.id))


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def create_tables(_: TaskiqState) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.create_all)


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def close_connections(_: TaskiqState) -> None:
    await connect.close()


async def main() -> None:
    await broker.startup()
    async with new_db_session_ctx():
        await place_order("tea")
    await broker.wait_all()
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
