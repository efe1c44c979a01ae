"""URLs made for libpq mean to asyncpg what they mean to libpq, which psycopg shows."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from sqlalchemy import URL, NullPool, text

from context_async_sqlalchemy._engine.from_url import create_engine
from context_async_sqlalchemy._engine.url import parse_url
from tests.helpers.postgres import free_port
from tests.helpers.tls import TLSServer, tls_server

Serve = Callable[..., AbstractAsyncContextManager[TLSServer]]

both_drivers = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


@pytest.fixture(autouse=True)
def _no_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The files in ~/.postgresql and these variables have a say, too.
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PGSSLMODE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def serve(database_url: URL, authority: trustme.CA) -> Serve:
    """Return how to run a TLS server in front of the database; `name` is in its certificate."""
    host, port = database_url.host, database_url.port

    @asynccontextmanager
    async def serve(name: str = "localhost", **options: Any) -> AsyncGenerator[TLSServer]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL  # of the client
        assert host is not None
        assert port is not None
        async with tls_server(host, port, context, **options) as server:
            yield server

    return serve


@pytest.fixture
def url(database_url: URL) -> Callable[..., URL]:
    """Return how to make the URL of the database with a query."""

    def url(server: TLSServer | None = None, driver: str = "asyncpg", **query: Any) -> URL:
        url = database_url.set(drivername=f"postgresql+{driver}", query=query)
        return url if server is None else url.set(host="localhost", port=server.port)

    return url


async def ask(url: URL, question: str = "SELECT 1", **options: Any) -> Any:
    """Return what the server answers, on a connection of its own."""
    engine = create_engine(parse_url(url), poolclass=NullPool, **options)
    async with engine.connect() as connection:
        return await connection.scalar(text(question))


async def is_let_in(url: URL, **options: Any) -> bool:
    """Return whether the client takes the server for the one it wants."""
    try:
        await ask(url, **options)
    except Exception as error:
        if "certificate" not in str(error):
            raise
        return False
    return True


async def test_the_url_of_a_hosted_database_just_works(serve: Serve, database_url: URL) -> None:
    async with serve() as server:
        place = f"{database_url.username}:p@localhost:{server.port}/{database_url.database}"
        url = f"postgresql://{place}?sslmode=require&channel_binding=require"
        engine = create_engine(parse_url(url), poolclass=NullPool)
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        assert server.seen == ["TLS"]


@both_drivers
@pytest.mark.parametrize(
    ("mode", "seen"),
    [
        ("disable", ["plain"]),
        ("allow", ["plain"]),
        ("prefer", ["TLS"]),
        ("require", ["TLS"]),
        ("verify-ca", ["TLS"]),
        ("verify-full", ["TLS"]),
    ],
)
async def test_sslmode_says_whether_there_is_tls(
    serve: Serve, url: Any, ca_file: Path, driver: str, mode: str, seen: list[str]
) -> None:
    async with serve() as server:
        await ask(url(server, driver, sslmode=mode, sslrootcert=str(ca_file)))
        assert server.seen == seen


@both_drivers
async def test_allow_uses_tls_where_the_server_wants_it(
    serve: Serve, url: Any, driver: str
) -> None:
    async with serve(takes_plain=False) as server:
        await ask(url(server, driver, sslmode="allow"))
        assert server.seen == ["plain", "TLS"]


@both_drivers
async def test_only_prefer_does_without_tls_where_there_is_none(url: Any, driver: str) -> None:
    await ask(url(driver=driver, sslmode="prefer"))
    with pytest.raises(Exception, match="SSL"):
        await ask(url(driver=driver, sslmode="require"))


@both_drivers
@pytest.mark.parametrize(
    ("mode", "expected"), [("require", True), ("verify-ca", True), ("verify-full", False)]
)
async def test_only_verify_full_refuses_another_host(
    serve: Serve, url: Any, ca_file: Path, driver: str, mode: str, expected: bool
) -> None:
    async with serve("elsewhere.example") as server:
        target = url(server, driver, sslmode=mode, sslrootcert=str(ca_file))
        assert await is_let_in(target) is expected


@both_drivers
@pytest.mark.parametrize(
    ("mode", "has_root", "expected"),
    [
        ("prefer", True, True),
        ("require", False, True),
        ("require", True, False),  # with a root certificate, libpq takes it for verify-ca
        ("verify-ca", True, False),
        ("verify-ca", False, False),
        ("verify-full", False, False),
    ],
)
async def test_a_certificate_that_nobody_vouches_for(
    serve: Serve,
    url: Any,
    tmp_path: Path,
    driver: str,
    mode: str,
    has_root: bool,
    expected: bool,
) -> None:
    root = tmp_path / "another.pem"
    trustme.CA().cert_pem.write_to_path(str(root))
    query = {"sslrootcert": str(root)} if has_root else {}
    async with serve() as server:
        assert await is_let_in(url(server, driver, sslmode=mode, **query)) is expected


@both_drivers
@pytest.mark.parametrize(("name", "expected"), [("localhost", True), ("elsewhere.example", False)])
async def test_the_systems_certificates_are_used_where_asked_for(
    serve: Serve,
    url: Any,
    ca_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    name: str,
    expected: bool,
) -> None:
    async with serve(name) as server:
        target = url(server, driver, sslmode="verify-full", sslrootcert="system")
        assert await is_let_in(target) is False
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
        assert await is_let_in(target) is expected


@both_drivers
@pytest.mark.parametrize("root", ["file", "system"])
async def test_the_client_shows_its_certificate(
    serve: Serve,
    url: Any,
    authority: trustme.CA,
    ca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    root: str,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    issued = authority.issue_cert("c@example.org", common_name="client")
    cert, key = tmp_path / "client.crt", tmp_path / "client.key"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    query = {
        "sslmode": "verify-full",
        "sslrootcert": root if root == "system" else str(ca_file),
        "sslcert": str(cert),
        "sslkey": str(key),
    }
    async with serve() as server:
        await ask(url(server, driver, **query))
        assert server.seen == ["client"]


@both_drivers
async def test_options_and_application_name_reach_the_server(url: Any, driver: str) -> None:
    target = url(
        driver=driver,
        options=r"-c search_path=a,public --statement_timeout=7s -c application_name=x\ y",
    )
    assert await ask(target, "SHOW search_path") == "a,public"
    assert await ask(target, "SHOW statement_timeout") == "7s"
    assert await ask(target, "SHOW application_name") == "x y"
    assert await ask(url(driver=driver, application_name="a b"), "SHOW application_name") == "a b"


async def test_connect_args_win_over_the_url(serve: Serve, url: Any) -> None:
    settings = {"application_name": "mine"}
    async with serve() as server:
        target = url(server, sslmode="require", application_name="its", options="-c jit=off")
        arguments = {"ssl": False, "server_settings": settings}
        assert await ask(target, "SHOW application_name", connect_args=arguments) == "mine"
        assert await ask(target, "SHOW jit", connect_args=arguments) == "off"
        assert server.seen == ["plain", "plain"]
        hasty = url(server, connect_timeout="0.000001")
        assert await ask(hasty, connect_args={"timeout": 10}) == 1
    assert settings == {"application_name": "mine"}


async def test_connect_timeout_ends_the_wait_for_a_server_that_is_silent(url: Any) -> None:
    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(be_silent, "127.0.0.1", 0)
    try:
        target = url(TLSServer(silent.sockets[0].getsockname()[1]), connect_timeout="0.1")
        async with asyncio.timeout(30):
            with pytest.raises(TimeoutError):
                await ask(target)
    finally:
        silent.close()
    assert await ask(url(connect_timeout="0")) == 1  # no limit, to libpq


async def test_target_session_attrs_are_asked_for(url: Any) -> None:
    assert await ask(url(target_session_attrs="read-write")) == 1
    with pytest.raises(Exception, match="target attribute"):
        await ask(url(target_session_attrs="standby"))


async def test_the_next_of_several_hosts_is_tried(url: Any, database_url: URL) -> None:
    hosts = (f"127.0.0.1:{free_port()}", f"{database_url.host}:{database_url.port}")
    target = url(host=hosts, sslmode="prefer").set(host=None, port=None)
    assert await ask(target) == 1


async def test_what_asyncpg_wants_as_numbers_arrives_as_numbers(url: Any) -> None:
    target = url(
        statement_cache_size="0",
        prepared_statement_cache_size="0",
        max_cached_statement_lifetime="5",
        max_cacheable_statement_size="100",
        command_timeout="5.5",
        timeout="5",
        sslnegotiation="postgres",
        gssencmode="prefer",
        application_name="",
    )
    assert await ask(target) == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("pgbouncer=true", "'pgbouncer'"),
        ("sslpassword=telltale", "'sslpassword'"),
        ("gssencmode=require", "'gssencmode=require'"),
        ("channel_binding=yes", "'channel_binding=yes'"),
        ("sslmode=verify_full", "sslmode must be one of .*verify-full, not 'verify_full'"),
        ("ssl=true", "sslmode must be one of .*, not 'true'"),
        ("sslmode=require&sslrootcert=system", "sslrootcert=system needs sslmode=verify-full"),
        ("sslrootcert=system&sslcrl=x", "sslcrl: not supported with sslrootcert=system"),
        ("sslnegotiation=direct&sslmode=prefer", "direct needs sslmode=require, or a stronger"),
        ("connect_timeout=soon", "'soon' is no value for 'connect_timeout'"),
        ("sslnegotiation=later", "'later' is no value for 'sslnegotiation'"),
    ],
)
def test_what_asyncpg_does_not_support_is_refused_by_name(query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        create_engine(parse_url(f"postgresql://u@h/db?{query}"))
    assert "telltale" not in str(caught.value)


def test_psycopg_gets_the_query_as_it_is() -> None:
    url = parse_url("postgresql+psycopg://u@h/db?sslmode=require&channel_binding=require&x=y")
    assert create_engine(url).url == url
