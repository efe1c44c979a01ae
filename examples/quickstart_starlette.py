from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware

connect = DBConnect.from_url("sqlite:///notes.db")


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(text("CREATE TABLE IF NOT EXISTS note (body TEXT UNIQUE)"))
    yield
    await connect.close()


async def add_note(request: Request) -> Response:
    session = await db_session(connect)
    await session.execute(text("INSERT INTO note VALUES (:body)"), request.path_params)
    return Response(status_code=201)


app = Starlette(routes=[Route("/notes/{body}", add_note, methods=["POST"])], lifespan=lifespan)
add_starlette_http_db_session_middleware(app)
