"""JSON-RPC, which answers an error with 200."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import CheckConstraint, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    roll_back_this_request,
)
from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///json_rpc.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "json_rpc_stock"
    __table_args__ = (CheckConstraint("amount >= 0"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    amount: Mapped[int]


async def store(name: str, amount: int) -> str:
    (await db_session(connect)).add(Stock(name=name, amount=amount))
    return name


async def take(names: list[str]) -> int:
    session = await db_session(connect)
    for name in names:
        statement = update(Stock).where(Stock.name == name)
        await session.execute(statement.values(amount=Stock.amount - 1))
    return len(names)


METHODS: dict[str, Callable[..., Awaitable[Any]]] = {
    "store": store,
    "take": take,
}


def answer_of(call: Any, **outcome: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": call["id"], **outcome}


def error_of(call: Any, error: Exception) -> dict[str, Any]:
    message = (
        "not available"
        if isinstance(error, IntegrityError)
        else type(error).__name__
    )
    return answer_of(call, error={"code": -32000, "message": message})


async def rpc(request: Request) -> JSONResponse:
    call = await request.json()
    try:
        result = await METHODS[call["method"]](**call["params"])
    except Exception as error:
        roll_back_this_request()
        return JSONResponse(error_of(call, error))
    return JSONResponse(answer_of(call, result=result))


MOST_CALLS = 100


async def batch(request: Request) -> JSONResponse:
    answers = []
    calls = await request.json()
    if len(calls) > MOST_CALLS:
        raise HTTPException(413)
    for call in calls:
        try:
            async with new_db_session_ctx():
                result = await METHODS[call["method"]](**call["params"])
            answers.append(answer_of(call, result=result))
        except Exception as error:
            answers.append(error_of(call, error))
    return JSONResponse(answers)


routes = [
    Route("/rpc", rpc, methods=["POST"]),
    Route("/batch", batch, methods=["POST"]),
]
app = Starlette(
    routes=routes,
    lifespan=database_lifespan(connect, create_tables=Base.metadata),
)
add_starlette_http_db_session_middleware(app)
