"""The chat: what is heard is committed, what fails is told to its sender, and the page works."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from sqlalchemy import event, text
from websockets.asyncio.client import ClientConnection, connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from examples.websocket_chat import rooms
from tests.helpers.connections import connections_out
from tests.helpers.postgres import free_port
from tests.helpers.programs import Outside, until
from tests.helpers.servers import running_module
from tests.helpers.serving import serve

BODIES = "SELECT body FROM chat_message ORDER BY id"
COMMAND = "uvicorn examples.websocket_chat.app:app --ws wsproto --ws-max-size 16384 --port {port}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'chat.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest.fixture
def chat(url: str, load: Callable[[str, str], Any]) -> Any:
    """Return the application, on each database."""
    return load("websocket_chat.app", url)


@pytest_asyncio.fixture
async def port(chat: Any) -> AsyncGenerator[int]:
    async with serve(chat.app, ws="wsproto") as port:
        yield port
    await until(lambda: not rooms.members)


def enter(port: int, room: str, **options: Any) -> connect_websocket:
    return connect_websocket(f"ws://127.0.0.1:{port}/chat?room={room}", **options)


async def send(websocket: ClientConnection, body: str, author: str = "ann") -> None:
    await websocket.send(json.dumps({"author": author, "body": body}))


async def heard(websocket: ClientConnection) -> Any:
    """Return the next thing that a client is told: of a message, the body."""
    async with asyncio.timeout(10):
        event = json.loads(await websocket.recv())
    return event.get("body") or event


async def test_a_message_is_heard_in_its_room_once_it_is_committed(
    port: int, chat: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_then = []

    async def broadcast(room: str, event: dict[str, Any]) -> None:
        stored_then.append(await Outside(url).rows(BODIES))
        rooms.broadcast(room, event)

    monkeypatch.setattr(chat, "broadcast", broadcast)
    async with enter(port, "tea") as ann, enter(port, "tea") as bob, enter(port, "milk") as eve:
        await send(ann, "good morning")
        assert await heard(ann) == await heard(bob) == "good morning"
        assert await heard(ann) == {"stored": True}
        await send(eve, "moo")
        assert await heard(eve) == "moo"
        await send(bob, "good day", author="bob")
        assert await heard(bob) == await heard(ann) == "good day"
        assert connections_out(chat.connect) == 0
    assert stored_then == [
        ["good morning"],
        ["good morning", "moo"],
        ["good morning", "moo", "good day"],
    ]


@pytest.mark.parametrize(
    "message",
    [
        '{"author": "ann", "body": ""}',
        json.dumps({"author": "ann", "body": "x" * 501}),
        json.dumps({"author": "x" * 41, "body": "hello"}),
        '{"author": "ann", "body": "\\ud800"}',
        '{"author": "ann"}',
        '{"author": "ann", "body": "a\\u0000b"}',
        '{"author": "a\\u0000b", "body": "hello"}',
        "nonsense",
        b"\xff",
    ],
)
async def test_what_has_no_sense_is_told_to_its_sender_only(
    port: int, url: str, message: str | bytes
) -> None:
    async with enter(port, "tea") as ann, enter(port, "tea") as bob:
        await ann.send(message)
        assert await heard(ann) == {
            "error": "A name has 1 to 40 characters, a message 1 to 500, without NUL."
        }
        await send(ann, "x" * 500)
        assert await heard(bob) == await heard(ann) == "x" * 500
    assert await Outside(url).rows(BODIES) == ["x" * 500]


async def test_a_message_that_cannot_be_stored_is_told_to_its_sender_only(
    port: int, chat: Any, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def rename(name: str, to: str) -> None:
        async with Outside(url).connection() as connection:
            await connection.execute(text(f"ALTER TABLE {name} RENAME TO {to}"))

    async with enter(port, "tea") as ann, enter(port, "tea") as bob:
        await rename("chat_message", "gone")
        await send(ann, "lost")
        assert await heard(ann) == {"error": "Your message could not be stored. Try again."}
        await rename("gone", "chat_message")
        assert connections_out(chat.connect) == 0
        await send(ann, "found")
        assert await heard(bob) == await heard(ann) == "found"
    assert caplog.text.count("A message failed") == 1


async def test_the_history_is_the_newest_of_the_room(port: int, url: str) -> None:
    async with enter(port, "tea") as ann, enter(port, "milk") as eve:
        await send(eve, "moo")
        for number in range(55):
            await send(ann, str(number))
        while await heard(ann) != "54":
            pass
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        messages = (await client.get("/messages", params={"room": "tea"})).json()
        assert [message["body"] for message in messages] == [str(n) for n in range(5, 55)]
        assert messages[0].keys() == {"id", "author", "body"}
        assert (await client.get("/messages", params={"room": "empty"})).json() == []
        for query in ("", "?room=", "?room=%00", f"?room={'x' * 41}"):
            assert (await client.get(f"/messages{query}")).status_code == 422


async def test_a_client_that_does_not_read_is_given_up_and_holds_nobody_up(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "SLOW", 0.1)
    slow = enter(port, "tea", max_queue=1, compression=None)
    async with slow as websocket, enter(port, "tea") as bob:
        await until(lambda: len(rooms.members["tea"]) == 2)
        # More than the buffers in between hold.
        for _ in range(50):
            rooms.broadcast("tea", {"body": "x" * 500_000})
            await heard(bob)
        await until(lambda: len(rooms.members["tea"]) == 1)
        await send(bob, "still here")
        assert await heard(bob) == "still here"
        websocket.transport.abort()


async def test_a_client_that_falls_too_far_behind_is_given_up(port: int) -> None:
    async with enter(port, "tea") as ann:
        await until(lambda: rooms.members)
        for _ in range(rooms.UNREAD + 1):
            rooms.broadcast("tea", {"body": "x"})
        assert rooms.members == {}
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionClosed):
                await ann.recv()


async def test_a_client_that_writes_and_does_not_read_fills_no_memory(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "SLOW", 0.5)
    waiting = 0

    def is_given_up() -> bool:
        nonlocal waiting
        for outbox in rooms.members.get("tea", ()):
            waiting = max(waiting, outbox.qsize())
        return not rooms.members

    async with enter(port, "tea", max_queue=1, compression=None) as ann:
        await until(lambda: rooms.members)
        for _ in range(50):  # more than the buffers in between hold
            rooms.broadcast("tea", {"body": "x" * 500_000})

        async def flood() -> None:
            while True:
                await ann.send("nonsense")
                await asyncio.sleep(0)  # the server is in this loop, too

        flooding = asyncio.create_task(flood())
        await until(is_given_up)
        flooding.cancel()
        ann.transport.abort()
    assert 0 < waiting <= rooms.UNREAD


async def test_a_message_that_is_far_too_long_does_not_get_to_the_database(
    port: int, chat: Any
) -> None:
    statements: list[str] = []
    async with enter(port, "tea") as ann:
        listen = event.listens_for(chat.connect.engine.sync_engine, "before_cursor_execute")
        listen(lambda _, __, statement, *___: statements.append(statement))
        for body in ("x" * 1_000_000, "x" * 501):
            await send(ann, body)
            assert "error" in await heard(ann)
        await ann.send(json.dumps({"author": "ann", "body": "x"}) + " " * 10_000)
        assert "error" in await heard(ann)
        assert statements == []
        await send(ann, "\U0001f600" * 500)
        assert await heard(ann) == "\U0001f600" * 500
        assert statements


async def test_a_page_of_another_site_is_refused(port: int) -> None:
    for origin in ("https://elsewhere.example", f"http://127.0.0.1:{port}.example", "null"):
        with pytest.raises(InvalidStatus, match="403"):
            await enter(port, "tea", origin=origin)
    async with enter(port, "tea", origin=f"http://127.0.0.1:{port}") as ann:
        await send(ann, "hello")
        assert await heard(ann) == "hello"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = (Path(rooms.__file__).parent / "page.html").read_text()
    assert re.findall(r"https?://|@import|url\(", page) == []
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]


# In a browser

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="Chromium is not installed: apt-get install chromium chromium-driver",
)


@pytest.fixture
def browser(tmp_path: Path) -> Generator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        *("--headless", "--no-sandbox", "--disable-dev-shm-usage"),
        *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, Service(CHROMEDRIVER))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


@pytest.fixture
def address(file: Path, tmp_path: Path) -> Generator[str]:
    with running_module(COMMAND, tmp_path / "log", DATABASE_URL=f"sqlite:///{file}") as port:
        yield f"http://127.0.0.1:{port}/?room=tea"


class Page:
    """The page as its user sees it, in a tab of its own."""

    def __init__(self, browser: webdriver.Chrome, address: str, name: str) -> None:
        self._browser = browser
        browser.switch_to.new_window("tab")
        self._tab = browser.current_window_handle
        browser.get(address)
        self.shows("status", "Connected")
        self.write("name", name)

    def write(self, field: str, value: str) -> None:
        self._browser.switch_to.window(self._tab)
        element = self._browser.find_element(By.ID, field)
        element.clear()
        element.send_keys(value)

    def say(self, message: str) -> None:
        self.write("body", message + Keys.ENTER)

    def shows(self, place: str, wanted: str) -> None:
        """Wait until a part of the page has this text."""
        self._browser.switch_to.window(self._tab)
        WebDriverWait(self._browser, 20, 0.05).until(
            lambda browser: browser.find_element(By.ID, place).text == wanted,
            f"{place} does not show {wanted!r}",
        )

    def run(self, script: str) -> Any:
        self._browser.switch_to.window(self._tab)
        return self._browser.execute_script(script)


@in_a_browser
def test_two_tabs_see_what_the_other_one_says(browser: webdriver.Chrome, address: str) -> None:
    ann, bob = Page(browser, address, "Ann"), Page(browser, address, "Bob")
    ann.say("Good morning")
    bob.shows("log", "Ann\nGood morning")
    bob.say("Good day")
    for page in ann, bob, Page(browser, address, "Eve"):  # who sees what was said before
        page.shows("log", "Ann\nGood morning\nBob\nGood day")
        assert page.run("return document.title") == "Chat: tea"
        assert page.run("return document.getElementById('body').value") == ""
    Page(browser, address.replace("tea", "milk"), "Eve").shows("log", "")
    here = ann.run("return location.origin")
    fetched = ann.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert fetched == [f"{here}/messages?room=tea"]


@in_a_browser
def test_what_others_write_is_text(browser: webdriver.Chrome, address: str) -> None:
    ann, bob = Page(browser, address, "<i>Ann</i>"), Page(browser, address, "Bob")
    attack = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    ann.say(attack)
    for page in bob, Page(browser, address, "Eve"):
        page.shows("log", f"<i>Ann</i>\n{attack}")
        assert page.run("return document.querySelectorAll('#log :not(li, b)').length") == 0
        assert page.run("return document.title") == "Chat: tea"


@in_a_browser
def test_a_message_that_failed_is_kept_for_another_try(
    browser: webdriver.Chrome, address: str
) -> None:
    page = Page(browser, address, "Ann")
    # As a browser would that does not keep to maxlength.
    page.run("document.getElementById('body').maxLength = 1000")
    page.say("x" * 501)
    page.shows("error", "A name has 1 to 40 characters, a message 1 to 500, without NUL.")
    assert page.run("return document.getElementById('body').value") == "x" * 501
    page.say("short")
    page.shows("log", "Ann\nshort")
    page.shows("error", "")


@in_a_browser
def test_the_page_connects_again_and_catches_up(
    browser: webdriver.Chrome, file: Path, tmp_path: Path
) -> None:
    port, url = free_port(), f"sqlite:///{file}"
    with running_module(COMMAND, tmp_path / "log", port=port, DATABASE_URL=url):
        page = Page(browser, f"http://127.0.0.1:{port}/?room=tea", "Ann")
        page.say("before")
        page.shows("log", "Ann\nbefore")
    page.shows("status", "Connecting…")
    page.say("during")
    page.shows("error", "Not connected: try again in a moment.")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(
            "INSERT INTO chat_message (room, author, body) VALUES ('tea', 'Bob', 'meanwhile')"
        )
    with running_module(COMMAND, tmp_path / "log", port=port, DATABASE_URL=url):
        page.shows("log", "Ann\nbefore\nBob\nmeanwhile")
        page.shows("status", "Connected")
        page.say("after")
        page.shows("log", "Ann\nbefore\nBob\nmeanwhile\nAnn\nafter")


async def test_one_command_serves_it(url: str, chat: Any, tmp_path: Path) -> None:
    with running_module(COMMAND, tmp_path / "log", DATABASE_URL=url) as port:
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
            enter(port, "tea") as ann,
        ):
            page = await client.get("/")
            assert page.headers["content-type"].startswith("text/html")
            await send(ann, "hello")
            assert await heard(ann) == "hello"
            assert (await client.get("/messages?room=tea")).json()[0]["body"] == "hello"
