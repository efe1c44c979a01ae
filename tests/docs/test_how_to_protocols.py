"""The programs of the page on protocols that answer an error with 200, run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from typing import Any

import pytest
import pytest_asyncio
from mcp import Client
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.routing import Mount

from context_async_sqlalchemy import DBConnect, new_db_session_ctx, roll_back_this_request
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client, serve

# GraphQL


@pytest_asyncio.fixture
async def graphql(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the transfers, served, with a client in it and two accounts."""
    program = load("graphql", url)
    program.outside = Outside(url)
    logging.getLogger("strawberry.execution").disabled = True
    async with http_client(program.app) as program.client:
        answer = await ask(program, OPEN.format("ann", 100) + OPEN.format("bob", 0))
        assert answer == {"data": {"ann": "ann", "bob": "bob"}}
        yield program
        await until(lambda: connections_out(program.connect) == 0)
    logging.getLogger("strawberry.execution").disabled = False


OPEN = '{0}: open(account: "{0}", balance: {1}) '
TRANSFER = 'transfer(source: "ann", target: "{}", amount: {})'
BALANCES = "SELECT name, balance FROM graphql_account ORDER BY name"
UNTOUCHED = [("ann", 100), ("bob", 0)]


async def ask(program: Any, fields: str, kind: str = "mutation") -> Any:
    response = await program.client.post("/graphql", json={"query": f"{kind} {{ {fields} }}"})
    assert response.status_code == 200
    answer = response.json()
    answer.pop("extensions", None)
    return answer


async def test_a_mutation_that_goes_well_is_stored(graphql: Any) -> None:
    answer = await ask(graphql, TRANSFER.format("bob", 30))
    assert answer == {"data": {"transfer": "transferred"}}
    assert await graphql.outside.rows(BALANCES) == [("ann", 70), ("bob", 30)]
    answer = await ask(graphql, 'balance(account: "bob")', "query")
    assert answer == {"data": {"balance": 30}}


async def test_a_mutation_that_fails_stores_nothing(graphql: Any) -> None:
    answer = await ask(graphql, TRANSFER.format("nobody", 30))
    assert answer["data"] == {"transfer": None}
    assert "no account 'nobody'" in answer["errors"][0]["message"]
    assert await graphql.outside.rows(BALANCES) == UNTOUCHED


async def test_a_statement_that_fails_is_an_answer_of_graphql(graphql: Any) -> None:
    answer = await ask(graphql, TRANSFER.format("bob", 101))
    assert answer["data"] == {"transfer": None}
    assert len(answer["errors"]) == 1
    assert await graphql.outside.rows(BALANCES) == UNTOUCHED


async def test_an_error_undoes_every_mutation_of_the_request(graphql: Any) -> None:
    both = f"first: {TRANSFER.format('bob', 30)} second: {TRANSFER.format('nobody', 1)}"
    answer = await ask(graphql, both)
    assert answer["data"] == {"first": "transferred", "second": None}
    assert await graphql.outside.rows(BALANCES) == UNTOUCHED


async def test_a_mutation_that_is_a_unit_of_work_is_apart(graphql: Any) -> None:
    fields = f"{OPEN.format('cid', 1)} {TRANSFER.format('nobody', 1)} {OPEN.format('cid2', -1)}"
    answer = await ask(graphql, fields)
    # The commit of the last one has failed, and that is an error of its field, too.
    assert answer["data"] == {"cid": "cid", "transfer": None, "cid2": None}
    assert [error["path"] for error in answer["errors"]] == [["transfer"], ["cid2"]]
    assert await graphql.outside.rows(BALANCES) == [*UNTOUCHED, ("cid", 1)]


async def test_concurrent_resolvers_of_concurrent_clients_are_answered_on_a_cold_pool(
    graphql: Any,
) -> None:
    await graphql.connect.engine.dispose()
    fields = " ".join(f'a{n}: balance(account: "ann")' for n in range(4))
    answers = await asyncio.gather(*(ask(graphql, fields, "query") for _ in range(30)))
    assert answers == [{"data": dict.fromkeys(("a0", "a1", "a2", "a3"), 100)}] * 30


async def test_of_concurrent_clients_those_store_nothing_whose_mutation_fails(
    graphql: Any,
) -> None:
    mutations = [TRANSFER.format(target, 1) for target in ("bob", "nobody") * 8]
    answers = await asyncio.gather(*(ask(graphql, mutation) for mutation in mutations))
    assert ["errors" in answer for answer in answers] == [False, True] * 8
    assert await graphql.outside.rows(BALANCES) == [("ann", 92), ("bob", 8)]


async def test_a_query_of_more_fields_than_anybody_needs_is_refused(graphql: Any) -> None:
    fields = " ".join(OPEN.format(f"a{number}", 1) for number in range(200))
    assert "200 aliases found" in (await ask(graphql, fields))["errors"][0]["message"]
    assert await graphql.outside.rows(BALANCES) == UNTOUCHED


async def test_a_query_that_cannot_be_read_is_answered(graphql: Any) -> None:
    assert "errors" in await ask(graphql, "nothing { of")


# MCP


@pytest_asyncio.fixture
async def notes(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the notes, and the port where it is served."""
    program = load("mcp_server", url)
    program.outside = Outside(url)
    logging.getLogger("mcp").disabled = True
    async with serve(program.app) as program.port:
        yield program
    logging.getLogger("mcp").disabled = False


NOTES = "SELECT body FROM mcp_note ORDER BY body"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_tool_that_returns_is_committed_and_one_that_raises_is_not(
    notes: Any, mode: Any
) -> None:
    async with Client(f"http://127.0.0.1:{notes.port}/mcp", mode=mode) as client:
        for bodies, is_error in (
            (["milk", "tea"], False),
            (["bread", ""], True),
            (["tea"], True),
            ([str(number) for number in range(101)], True),
        ):
            result = await client.call_tool("take_notes", {"notes": bodies})
            assert result.is_error is is_error
            # It is durable when the client has the answer.
            assert await notes.outside.rows(NOTES) == ["milk", "tea"]
        assert connections_out(notes.connect) == 0


async def test_calls_at_the_same_time_are_apart(notes: Any) -> None:
    async with Client(f"http://127.0.0.1:{notes.port}/mcp") as client:
        calls = [[str(n), "" if n % 2 else f"{n} again"] for n in range(6)]
        await asyncio.gather(*(client.call_tool("take_notes", {"notes": c}) for c in calls))
    kept = sorted(note for call in calls[::2] for note in call)
    assert await notes.outside.rows(NOTES) == kept


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("way", ["a block", "a mark"])
async def test_a_tool_inside_the_middleware_is_settled_by_its_block_or_its_mark(
    connect: DBConnect, database: Database, mode: Any, stateless: bool, as_json: bool, way: str
) -> None:
    server = MCPServer("items", log_level="CRITICAL")
    logging.getLogger("mcp").disabled = True

    @server.tool()
    async def put(name: str, fails: bool) -> str:
        async with new_db_session_ctx() if way == "a block" else nullcontext():
            await add(connect, name)
            if fails:
                roll_back_this_request()
                raise ValueError
        return name

    mounted = server.streamable_http_app(stateless_http=stateless, json_response=as_json)
    app = Starlette(routes=[Mount("/", mounted)], lifespan=lambda _: server.session_manager.run())
    add_starlette_http_db_session_middleware(app)
    async with (
        serve(app) as port,
        Client(f"http://127.0.0.1:{port}/mcp", mode=mode) as client,
    ):
        for name, fails in ("good", False), ("bad", True):
            result = await client.call_tool("put", {"name": name, "fails": fails})
            assert result.is_error is fails
            await until(lambda: connections_out(connect) == 0)
            assert await database.names() == ["good"]
    logging.getLogger("mcp").disabled = False


# JSON-RPC


@pytest_asyncio.fixture
async def stock(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the stock, served, with a client in it."""
    program = load("json_rpc", url)
    program.outside = Outside(url)
    async with http_client(program.app) as program.client:
        assert await rpc(program, "store", name="pen", amount=2) == {"result": "pen"}
        yield program
        await until(lambda: connections_out(program.connect) == 0)


STOCK = "SELECT name, amount FROM json_rpc_stock ORDER BY name"


async def rpc(program: Any, method: str, **params: Any) -> Any:
    call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    response = await program.client.post("/rpc", json=call)
    assert response.status_code == 200
    answer = response.json()
    assert (answer.pop("jsonrpc"), answer.pop("id")) == ("2.0", 1)
    return answer


async def test_a_call_that_fails_stores_nothing_and_is_answered_by_the_protocol(
    stock: Any,
) -> None:
    assert await rpc(stock, "take", names=["pen"]) == {"result": 1}
    answer = await rpc(stock, "take", names=["pen", "pen"])
    assert answer == {"error": {"code": -32000, "message": "not available"}}
    assert await rpc(stock, "nothing") == {"error": {"code": -32000, "message": "KeyError"}}
    assert await stock.outside.rows(STOCK) == [("pen", 1)]


async def test_of_concurrent_clients_those_store_nothing_whose_call_fails(stock: Any) -> None:
    answers = await asyncio.gather(*(rpc(stock, "take", names=["pen"]) for _ in range(20)))
    assert sorted(answers, key=str) == [
        *[{"error": {"code": -32000, "message": "not available"}}] * 18,
        *[{"result": 1}] * 2,
    ]
    assert await stock.outside.rows(STOCK) == [("pen", 0)]


async def test_the_calls_of_a_batch_are_apart(stock: Any) -> None:
    params: list[tuple[str, Any]] = [
        ("store", {"name": "cup", "amount": 1}),
        ("take", {"names": ["cup", "pen", "cup"]}),
        ("store", {"name": "cup", "amount": 5}),  # whose commit fails
        ("take", {"names": ["pen"]}),
    ]
    calls = [{"id": n, "method": m, "params": p} for n, (m, p) in enumerate(params)]
    answers = (await stock.client.post("/batch", json=calls)).json()
    assert [(a["id"], "error" in a) for a in answers] == [
        (0, False),
        (1, True),
        (2, True),
        (3, False),
    ]
    assert await stock.outside.rows(STOCK) == [("cup", 1), ("pen", 1)]


async def test_a_batch_of_more_calls_than_anybody_needs_is_refused(stock: Any) -> None:
    call = {"id": 1, "method": "store", "params": {"name": "cup", "amount": 1}}
    assert (await stock.client.post("/batch", json=[call] * 101)).status_code == 413
    assert ("cup", 1) not in await stock.outside.rows(STOCK)


async def test_an_error_of_the_commit_comes_after_the_answer_was_made(stock: Any) -> None:
    call = {"id": 1, "method": "store", "params": {"name": "pen", "amount": 1}}
    with pytest.raises(AssertionError, match="500"):
        await rpc(stock, "store", name="pen", amount=1)
    response = await stock.client.post("/batch", json=[call])
    assert response.json()[0]["error"] == {"code": -32000, "message": "not available"}
