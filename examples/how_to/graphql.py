"""Transfers over GraphQL, which answers an error with 200."""

import os
from typing import Any

import strawberry
from fastapi import FastAPI, Request
from sqlalchemy import CheckConstraint, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from strawberry.extensions import FieldExtension, MaxAliasesLimiter
from strawberry.fastapi import GraphQLRouter
from strawberry.http import GraphQLHTTPResponse
from strawberry.types import ExecutionResult, Info

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    roll_back_this_request,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///graphql.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "graphql_account"
    __table_args__ = (CheckConstraint("balance >= 0"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


async def add_to(name: str, amount: int) -> None:
    session = await db_session(connect)
    statement = update(Account).where(Account.name == name)
    result = await session.execute(
        statement.values(balance=Account.balance + amount).returning(
            Account.name
        )
    )
    if result.one_or_none() is None:
        raise ValueError(f"there is no account {name!r}")


class UnitOfWork(FieldExtension):
    """Settles what the field has written before the next one begins."""

    async def resolve_async(
        self, next_: Any, source: Any, info: Info, **kwargs: Any
    ) -> Any:
        async with new_db_session_ctx():
            return await next_(source, info, **kwargs)


@strawberry.type
class Query:
    @strawberry.field
    async def balance(self, account: str) -> int | None:
        found = await (await db_session(connect)).get(Account, account)
        return found.balance if found else None


@strawberry.type
class Mutation:
    @strawberry.mutation
    async def transfer(
        self, source: str, target: str, amount: int
    ) -> str | None:
        await add_to(source, -amount)
        await add_to(target, amount)
        return "transferred"

    @strawberry.mutation(extensions=[UnitOfWork()])
    async def open(self, account: str, balance: int) -> str | None:
        (await db_session(connect)).add(Account(name=account, balance=balance))
        return account


class Router(GraphQLRouter[Any, Any]):
    async def process_result(
        self, request: Request, result: ExecutionResult
    ) -> GraphQLHTTPResponse:
        if result.errors:
            roll_back_this_request()
        return await super().process_result(request, result)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
schema = strawberry.Schema(
    Query,
    Mutation,
    extensions=[
        lambda **_: MaxAliasesLimiter(max_alias_count=50)
    ],  # older ones pass an argument
)
app.include_router(Router(schema), prefix="/graphql")
add_fastapi_http_db_session_middleware(app)
