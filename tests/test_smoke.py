import httpx
from sqlalchemy import select, text
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from context_async_sqlalchemy import *
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.models import Item
from tests.server import http_client

async def test_smoke(connect, database):
    async def h(request):
        s = await db_session(connect)
        s.add(Item(name="a"))
        return JSONResponse({})
    app = Starlette(routes=[Route("/", h)])
    add_starlette_http_db_session_middleware(app)
    async with http_client(app) as c:
        r = await c.get("/")
        assert r.status_code == 200
        assert await database.names() == ["a"]
        r = await c.get("/")
        assert r.status_code == 500
        assert await database.names() == ["a"]
