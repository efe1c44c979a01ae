"""The program of the how-to page on admin panels, served, with each panel used over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.helpers.connections import connections_out
from tests.helpers.serving import http_client

Panel = Callable[[httpx.AsyncClient, str, str, dict[str, str]], Awaitable[httpx.Response]]


async def sqladmin(
    client: httpx.AsyncClient, action: str, pk: str, data: dict[str, str]
) -> httpx.Response:
    if action == "delete":
        return await client.delete(f"/admin/book/delete?pks={pk}")
    path = "/admin/book/create" if action == "create" else f"/admin/book/edit/{pk}"
    return await client.post(path, data=data)


async def starlette_admin(
    client: httpx.AsyncClient, action: str, pk: str, data: dict[str, str]
) -> httpx.Response:
    await client.get("/panel/book/list")
    headers = {"X-CSRFToken": client.cookies["starlette_admin_csrftoken"]}
    if action == "delete":
        path = f"/panel/_api/book/action?name=delete&pks={pk}"
        return await client.post(path, headers=headers)
    path = "/panel/book/create" if action == "create" else f"/panel/book/edit?pk={pk}"
    return await client.post(path, data=data, headers=headers)


@pytest_asyncio.fixture
async def books(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the books, served, with a client in it."""
    books = load("admin_panels", url)
    async with http_client(books.app) as books.client:
        yield books
        assert connections_out(books.connect) == 0


@pytest.mark.parametrize(
    ("panel", "pages"),
    [
        (sqladmin, ["/admin/book/list", "/admin/book/details/1", "/admin/book/edit/1"]),
        (starlette_admin, ["/panel/book/list", "/panel/book/detail?pk=1", "/panel/book/edit?pk=1"]),
    ],
)
async def test_a_panel_lists_creates_edits_and_deletes(
    books: Any, panel: Panel, pages: list[str]
) -> None:
    client = books.client

    async def titles() -> list[str]:
        return (await client.get("/titles")).json()  # type: ignore[no-any-return]

    assert (await client.get(pages[0])).status_code == 200
    response = await panel(client, "create", "", {"title": "Emma"})
    assert response.is_redirect
    assert await titles() == ["Emma"]

    # What fails stores nothing, and its connection comes home.
    response = await panel(client, "create", "", {"title": "Emma"})
    assert response.status_code >= 400
    assert await titles() == ["Emma"]
    assert connections_out(books.connect) == 0

    assert (await panel(client, "edit", "1", {"title": "Persuasion"})).is_redirect
    for page in pages:
        assert "Persuasion" in (await client.get(page)).text
    assert await titles() == ["Persuasion"]

    assert (await panel(client, "delete", "1", {})).is_success
    assert await titles() == []
