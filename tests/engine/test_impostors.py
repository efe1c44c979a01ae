"""A URL gives the password to no impostor to whom libpq, as psycopg uses it, would not give it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import trustme
from sqlalchemy import URL, NullPool
from sqlalchemy.exc import SQLAlchemyError

from context_async_sqlalchemy import DBConnect
from tests.helpers.tls import impostor

PASSWORD = "telltale"

# {ca} is the file of an authority that both clients are told to trust.
QUERIES = [
    "",
    "sslmode=disable",
    "sslmode=prefer",
    "sslmode=require",
    "sslmode=verify-ca&sslrootcert={ca}",
    "sslmode=verify-full&sslrootcert={ca}",
    "sslmode=require&sslrootcert={ca}",
    "sslmode=verify-full&sslrootcert=system",
    "sslrootcert=system",
    "sslmode=",
    "sslmode=verify-full&sslrootcert={ca}&ssl=require",
    "sslmode=verify-full&sslrootcert={ca}&sslmode=disable",
    "sslnegotiation=direct",
    "sslnegotiation=direct&sslmode=require",
    "sslnegotiation=direct&sslmode=verify-full&sslrootcert={ca}",
    "sslmode=require&sslnegotiation=",
    "channel_binding=require",
    "sslmode=require&channel_binding=require",
    "sslmode=verify-ca&sslrootcert={ca}&channel_binding=require",
    "sslmode=verify-full&sslrootcert={ca}&channel_binding=require",
    "sslmode=require&channel_binding=",
    "sslmode=require&require_auth=scram-sha-256",
    "sslmode=require&gssencmode=",
]


@pytest.fixture(params=["no TLS", "self-signed", "other name"])
def disguise(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ssl.SSLContext | None, Path]:
    """Return what the impostor shows, and the file of the authority that its clients trust."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PGSSLMODE", "PGSSLROOTCERT", "PGCHANNELBINDING", "PGSSLNEGOTIATION"):
        monkeypatch.delenv(name, raising=False)
    trusted, path = trustme.CA(), tmp_path / "ca.pem"
    trusted.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    if request.param == "no TLS":
        return None, path
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["postgresql"])
    if request.param == "self-signed":
        trustme.CA().issue_cert("localhost").configure_cert(context)
    else:
        trusted.issue_cert("elsewhere.example").configure_cert(context)
    return context, path


async def test_no_impostor_gets_a_password_that_libpq_keeps(
    disguise: tuple[ssl.SSLContext | None, Path], caplog: pytest.LogCaptureFixture
) -> None:
    context, ca = disguise
    outcomes = {}
    for query in QUERIES:
        place = f"u:{PASSWORD}@localhost:{{}}/db?{query.format(ca=ca)}"
        with impostor(context) as (port, told_by_libpq), pytest.raises(psycopg.Error):
            psycopg.connect("postgresql://" + place.format(port)).close()
        caplog.clear()
        with impostor(context) as (port, told_by_us):
            await fail_to_connect("postgresql://" + place.format(port))
        is_said = "sslmode=verify-full" in caplog.text
        outcomes[query] = (bool(told_by_libpq), bool(told_by_us), is_said)
        assert {*told_by_libpq, *told_by_us} <= {PASSWORD}
    weaker = {
        q for q, (libpq, ours, is_said) in outcomes.items() if ours and not (libpq or is_said)
    }
    assert weaker == set()


async def fail_to_connect(url: str) -> None:
    refusals = (ValueError, OSError, SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError)
    with pytest.raises(refusals):
        async with DBConnect.from_url(url, poolclass=NullPool) as connect:
            await connect.ping()


WARNING = "asyncpg has no channel binding"


@pytest.mark.parametrize(
    ("query", "connect_args", "is_warned"),
    [
        ("sslmode=require", {}, True),
        ("sslmode=verify-ca", {}, True),
        ("", {}, True),
        ("sslmode=verify-full", {}, False),
        ("ssl=verify-full", {}, False),
        ("sslrootcert=system", {}, False),
        ("sslmode=require", {"ssl": True}, False),
        ("sslmode=require", {"ssl": "verify-full"}, False),
        ("sslmode=require", {"ssl": ssl.create_default_context()}, False),
        ("sslmode=verify-full", {"ssl": "require"}, True),
        ("sslmode=verify-full", {"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)}, True),
    ],
)
async def test_a_required_channel_binding_is_warned_of_once_unless_the_server_is_verified(
    caplog: pytest.LogCaptureFixture,
    query: str,
    connect_args: dict[str, Any],
    is_warned: bool,
) -> None:
    url = f"postgresql://u@h/db?channel_binding=require&{query}"
    async with DBConnect.from_url(url, connect_args=connect_args) as connect:
        await connect.create_session()
        await (await connect.create_engine()).dispose()
    assert caplog.text.count(WARNING) == is_warned


def test_libpq_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    DBConnect.from_url("postgresql+psycopg://u@h/db?sslmode=require&channel_binding=require")
    DBConnect.from_url("postgresql://u@h/db?sslmode=require&channel_binding=prefer")
    assert WARNING not in caplog.text


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    "key", ["sslmode", "ssl", "sslnegotiation", "channel_binding", "target_session_attrs"]
)
def test_an_empty_value_is_refused_where_libpq_refuses_it(driver: str, key: str) -> None:
    text = f"postgresql+{driver}://u:{PASSWORD}@h/db?application_name=&{key}=&sslrootcert="
    for url in (text, URL.create(f"postgresql+{driver}", host="h", query={key: ""})):
        with pytest.raises(ValueError, match=f"{key} has no value in the URL's query"):
            DBConnect.from_url(url)


@pytest.mark.parametrize(
    "query",
    ["sslmode=verify-full&ssl=require", "sslmode=disable&sslmode=require", "sslkey=a&sslkey=b"],
)
def test_of_two_values_that_differ_none_wins(query: str) -> None:
    with pytest.raises(ValueError, match="the URL's query has different values for ssl"):
        DBConnect.from_url(f"postgresql://u@h/db?{query}")
    DBConnect.from_url("postgresql://u@h/db?sslmode=require&ssl=require&sslmode=require")
