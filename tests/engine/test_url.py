"""Database URLs: several hosts, a socket's directory, and whatever else somebody may write."""

from __future__ import annotations

import asyncio
import traceback
import warnings
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from sqlalchemy import URL, make_url
from sqlalchemy.exc import SAWarning

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy._engine.url import parse_url, set_host
from tests.helpers.postgres import free_port

# Not in one piece: a traceback shows the lines of this file.
SECRET = "tell" + "tale"
DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


def places_of(url: URL) -> Any:
    arguments = url.get_dialect()().create_connect_args(url)[1]
    return arguments.get("host"), arguments.get("port")


# Several hosts, and sockets.


@pytest.mark.parametrize(
    ("text", "hosts", "ports"),
    [
        ("h1:1,h2:2", ["h1", "h2"], [1, 2]),
        ("u:p@h1:1,h2:2", ["h1", "h2"], [1, 2]),
        ("u@h1,h2,h3", ["h1", "h2", "h3"], [5432, 5432, 5432]),
        ("u@[::1]:1,[fe80::2]:2", ["::1", "fe80::2"], [1, 2]),
        ("u@[::1],h2", ["::1", "h2"], [5432, 5432]),
        ("u@%2Fa%2Fb:1,h2:2", ["/a/b", "h2"], [1, 2]),
        ("u:a,b@h:1", ["h"], [1]),
        ("u@%2Fvar%2Frun:1", ["/var/run"], [1]),
        ("u@%2fvar", ["/var"], [5432]),
    ],
)
def test_several_hosts_and_sockets_are_read_as_libpq_does(
    text: str, hosts: list[str], ports: list[int]
) -> None:
    url = parse_url(f"postgresql://{text}/db?application_name=a")
    one = len(hosts) == 1
    assert places_of(url) == ((hosts[0], ports[0]) if one else (hosts, ports))
    assert (url.database, url.query["application_name"]) == ("db", "a")
    # As somebody may hand it on.
    again = parse_url(make_url(url.render_as_string(hide_password=False)))
    assert places_of(again) == places_of(url)
    with_psycopg = parse_url(f"postgresql+psycopg://{text}/db")
    host, port = places_of(with_psycopg)
    assert (host.split(","), [int(p) for p in str(port).split(",")]) == (hosts, ports)


def test_one_port_apart_is_that_of_every_host() -> None:
    assert places_of(parse_url(URL.create("postgresql", host="a,b", port=3))) == (
        ["a", "b"],
        [3, 3],
    )
    assert places_of(set_host(parse_url("postgresql://h:7/db"), "a,b")) == (["a", "b"], [7, 7])


def test_the_host_can_be_changed_from_one_to_several_and_back() -> None:
    url = set_host(parse_url("postgresql://h:7/db"), "a:1,b:2")
    assert places_of(url) == (["a", "b"], [1, 2])
    assert places_of(set_host(parse_url("postgresql://a:1,b:2/db"), "c:3")) == ("c", 3)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u@h1,h2:2/db", r"needs its port.*user@host1:5432,host2:5432"),
        ("postgresql://u@h1:1,h2/db", "needs its port"),
        (f"postgresql://u@h1:{SECRET},h2:1/db", "cannot be read"),
        ("postgresql://u@,h2/db", "cannot be read"),
        ("mysql://u@h1,h2/db", "asyncmy takes one host"),
        ("mysql+aiomysql://u@h1:1,h2:2/db", "aiomysql takes one host"),
        ("mariadb://u@%2Frun%2Fmysqld.sock/db", r"\?unix_socket=/path"),
        ("sqlite://h/db", "'sqlite:///name.db'"),
        (f"sqlite://u:{SECRET}@/db", "'sqlite:///name.db'"),
        ("sqlite://h1:1,h2:2/db", "'sqlite:///name.db'"),
        ("postgresql://u@h/db?port=1,2", "number of hosts and ports"),
        ("postgresql://u@h/db?host=a&port=x", "non-integer port"),
        ("postgresql://u@/db?host=a:1&host=b", "All ports are required"),
        ("postgresql://u@/db?host=a:1&host=b:2&port=3", "Can't mix 'multihost'"),
        ("postgresql://u@h/db?plugin=x", "Can't load plugin"),
        (f"postgresql://u@h/db?port=1,2&passwd={SECRET}", "number of hosts"),
    ],
)
def test_what_cannot_be_used_is_a_value_error_that_says_what_to_write(
    url: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DBConnect.from_url(url)
    assert type(caught.value) is ValueError
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@DRIVERS
async def test_the_host_that_answers_is_found_among_several(database_url: URL, driver: str) -> None:
    user, place = database_url.username, f"{database_url.host}:{database_url.port}"
    url = f"postgresql+{driver}://{user}@127.0.0.1:{free_port()},{place}/{database_url.database}"
    async with DBConnect.from_url(url) as connect:
        await connect.ping()
        await connect.change_host(place)
        await connect.ping()
        await connect.change_host(f"{place},127.0.0.1:{free_port()}")
        await connect.ping()


@asynccontextmanager
async def socket_in(directory: Path, port: int, url: URL) -> AsyncGenerator[None]:
    """Listen on a socket as PostgreSQL does; hand everything on to the server."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection(url.host, url.port)
        await asyncio.gather(copy(reader, server), copy(answers, writer))

    path = directory / f".s.PGSQL.{port}"
    async with await asyncio.start_unix_server(serve, path):
        yield


@DRIVERS
async def test_a_socket_with_a_port_is_used(database_url: URL, driver: str, tmp_path: Path) -> None:
    directory = str(tmp_path).replace("/", "%2F")
    user, database = database_url.username, database_url.database
    async with (
        socket_in(tmp_path, 5433, database_url),
        DBConnect.from_url(f"postgresql+{driver}://{user}@{directory}:5433/{database}") as connect,
    ):
        await connect.ping()


# The password.


def test_a_password_under_another_name_is_hidden() -> None:
    url = parse_url(f"mysql://h/db?user=u&passwd={SECRET}")
    assert (url.username, url.password) == ("u", SECRET)
    assert SECRET not in repr(url)


async def test_the_password_of_a_key_is_not_shown() -> None:
    async with DBConnect.from_url(
        f"postgresql+psycopg://u@h/db?sslpassword={SECRET}", connect_args={"connect_timeout": 3}
    ) as connect:
        await connect.session_maker()
        assert SECRET not in repr(connect.engine)


@pytest.mark.parametrize(
    "query",
    ["sslmode={}", "{}=1", "{}", "x=1&{}=2", "connect_timeout={}", "gssencmode={}", "port={}"],
)
def test_the_rest_of_a_password_is_not_shown_where_it_is_taken_for_a_query(query: str) -> None:
    with pytest.raises(ValueError, match="@") as caught:
        DBConnect.from_url(f"postgresql://user:a@b?{query.format(SECRET)}@host/db")
    assert SECRET not in "".join(map(str, chain_of(caught.value)))


@pytest.mark.parametrize("url", ["postgresql://u@h/db", "sqlite://"])
async def test_a_host_with_a_password_is_refused_and_not_shown(url: str) -> None:
    async with DBConnect.from_url(url) as connect:
        with pytest.raises(ValueError, match="a host has no user and no password") as caught:
            await connect.change_host(f"user:{SECRET}@h")
        assert SECRET not in str(caught.value)


def test_an_at_sign_in_a_value_is_no_mistake() -> None:
    DBConnect.from_url("postgresql://u:p@h/db?application_name=a@b")


# Whatever somebody may write.

PIECES = st.sampled_from(
    [
        *("postgresql", "postgres", "postgresql+psycopg", "sqlite", "mysql", "mysql+aiomysql"),
        *("mssql+aioodbc", "oracle+oracledb", "nosuch", "post gres", "://", "/", "///", ":", "@"),
        *("?", "&", "=", ",", "[", "]", "::1", "%2Ftmp", "/tmp", "h1", "h1:5432,h2:5433", "5432"),
        *("99999999", "-1", "abc", f"u:{SECRET}@", SECRET, f":{SECRET}@", "db", "%", "%41", " "),
        *("\n", "\0", "ü", "'", "#", ";", "+", ":memory:", "file:"),
    ]
)
QUERIES = st.sampled_from(
    [
        *("host=", "host=a:1", "host=b:2", "host=a,b", "port=", "port=1", "port=a", "port=1,2"),
        *("sslmode=require", "sslmode=", "sslmode=x", "user=u", f"password={SECRET}", "uri=true"),
        *(f"passwd={SECRET}", f"sslpassword={SECRET}", "mode=memory", "application_name=a"),
        *("timeout=a", "connect_timeout=a", "prepared_statement_cache_size=a", "plugin=x", "a=b"),
        *("ssl_ca=x", "read_timeout=a", "check_same_thread=a", "isolation_level=x", "options=-c"),
        *("sslrootcert=system", "sslnegotiation=q", "unix_socket=/x", "driver=x", "sid=1"),
    ]
)


def built(scheme: str, user: str, host: str, port: str, database: str, query: list[str]) -> str:
    return f"{scheme}://{user}{host}{port}{database}" + ("?" + "&".join(query) if query else "")


URLS = st.one_of(
    st.lists(st.one_of(PIECES, QUERIES), max_size=9).map("".join),
    st.builds(
        built,
        st.sampled_from(["postgresql", "postgresql+psycopg", "sqlite", "mysql", "mssql+aioodbc"]),
        st.sampled_from(["", "u@", f"u:{SECRET}@", f":{SECRET}@", f"u:{SECRET}@@"]),
        st.sampled_from(
            ["", "h", "h1,h2", "h1:1,h2", "h1:1,h2:2", "[::1]", "%2Ftmp", "%2F,h", ","]
        ),
        st.sampled_from(["", ":1", ":x", ":1,2", ":-1", ":99999", ":٣", ":"]),
        st.sampled_from(["", "/", "/db", "/a/b", "/%2F"]),
        st.lists(QUERIES, max_size=3),
    ),
)


def error_of(url: str, password: str | None, host: str) -> BaseException | None:
    try:
        connect = DBConnect.from_url(url, password)
        parsed = set_host(parse_url(url, password), host)
    except Exception as error:
        return error
    assert SECRET not in repr(connect) + repr(parsed.difference_update_query(["sslpassword"]))
    return None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@settings(
    max_examples=400,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(url=URLS, password=st.sampled_from([None, "", SECRET]), host=st.sampled_from(["h", "a,b:1"]))
def test_no_url_raises_anything_else_or_shows_a_password(
    url: str, password: str | None, host: str
) -> None:
    assume(SECRET not in url.partition("://")[0])  # which is the name of a driver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)
        error = error_of(url, password, host)
    assert type(error) in (type(None), TypeError, ValueError, ModuleNotFoundError)
    assert SECRET not in "".join(map(str, chain_of(error)))
