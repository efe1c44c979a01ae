from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    database_lifespan,
)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    body: Mapped[str] = mapped_column(primary_key=True)


async def add_note(request: Request) -> Response:
    session = await db_session(connect)
    session.add(Note(body=request.path_params["body"]))
    return Response(status_code=201)


connect = DBConnect.from_url("sqlite:///notes.db")
app = Starlette(
    routes=[Route("/notes/{body}", add_note, methods=["POST"])],
    lifespan=database_lifespan(connect, create_tables=Base.metadata),
)
add_starlette_http_db_session_middleware(app)
