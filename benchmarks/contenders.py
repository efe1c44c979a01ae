"""The contenders: what each is, and what it can do."""

from __future__ import annotations

import inspect
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks import applications
from benchmarks.applications import VERSION_2, OpenApp
from benchmarks.frameworks import FRAMEWORKS, Framework
from benchmarks.work import ROUTES

LIBRARY, FLOOR, LEAST, LIMIT = "this library", "by hand", "no error handling", "raw asyncpg"
AUTOCOMMIT, SETTINGS = ", AUTOCOMMIT", ", two settings"
READ_ONLY, IN_FLIGHT = f"{LIBRARY}, read-only", f"{LIBRARY}, BEGIN in the flight"


class Contender(NamedTuple):
    """A contender with a framework.

    Attributes:
        framework: The name of the framework.
        name: Its own name.
        open_app: Opens its application.
        differs: What is different about it, in Markdown.
        package: What has to be installed for it.
        option: The option of this library that it needs.
        routes: What it can do. Default: everything.
        around: How the calls begin that it sends before and after its work.
    """

    framework: str
    name: str
    open_app: OpenApp
    differs: str
    package: str = ""
    option: str = ""
    routes: tuple[str, ...] = ROUTES
    around: tuple[str, ...] = ("BEGIN", "COMMIT")

    @property
    def key(self) -> str:
        """Its name on the command line and in the results."""
        return f"{self.framework}: {self.name}"

    def obstacle(self) -> str | None:
        """Return why it cannot take part here, or None."""
        if self.name == VERSION_2.name and not VERSION_2.exists():
            return f"only `make bench` installs it, in {VERSION_2.parent}"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed: it does not go with these versions"
        if self.option:
            from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect

            documented = f"{DBConnect.from_url.__doc__}{ASGIHTTPDBSessionMiddleware.__doc__}"
            if self.option not in documented:
                return f"this library has no {self.option}"
        if self.name.startswith("Depends"):
            import fastapi

            if "scope" not in inspect.signature(fastapi.Depends).parameters:
                return f"FastAPI {fastapi.__version__} has no scopes of dependencies"
        return None


def _of_framework(name: str, framework: Framework) -> list[Contender]:
    library, hand = (
        partial(applications.this_library, framework),
        partial(applications.by_hand, framework),
    )
    return [
        Contender(name, FLOOR, hand, "The floor: `async with maker() as s, s.begin()`."),
        Contender(name, LIBRARY, library, "Commits before the response starts."),
        Contender(
            name,
            IN_FLIGHT,
            partial(library, begin_with_first_statement=True),
            "The same with `from_url(…, begin_with_first_statement=True)`.",
            option="begin_with_first_statement",
            around=("COMMIT",),
        ),
        Contender(
            name,
            LEAST,
            partial(applications.careless, framework),
            "Not for use: `maker()`, the statements and `commit()`, without error handling. This "
            "is the minimum with an `AsyncSession`.",
        ),
        Contender(
            name,
            LIMIT,
            partial(applications.by_asyncpg, framework),
            "The limit: no SQLAlchemy, the same SQL written out, and a pool that resets nothing.",
        ),
        Contender(
            name,
            FLOOR + AUTOCOMMIT,
            partial(hand, isolation_level="AUTOCOMMIT"),
            "Only for reads: no transaction, on an engine and a pool of its own.",
            routes=("select",),
            around=(),
        ),
        Contender(
            name,
            READ_ONLY,
            partial(library, middleware={"read_only_methods": {"GET"}}),
            "Only for reads: no transaction, on the same pool (`read_only_methods`).",
            option="read_only_methods",
            routes=("select",),
            around=(),
        ),
    ]


def _with_settings(name: str, **options: Any) -> Contender:
    return Contender(
        "FastAPI",
        name + SETTINGS,
        partial(
            applications.this_library,
            FRAMEWORKS["FastAPI"],
            transaction_settings=lambda: {"app.tenant": "1", "statement_timeout": "2s"},
            **options,
        ),
        "Each transaction has a tenant and a timeout: `transaction_settings`.",
        option=next(iter(options), ""),
        routes=("insert",),
        around=("COMMIT",) if options else ("BEGIN", "COMMIT"),
    )


CONTENDERS = [
    *(c for name, framework in FRAMEWORKS.items() for c in _of_framework(name, framework)),
    Contender(
        "FastAPI",
        FLOOR + SETTINGS,
        applications.with_settings_by_hand,
        "Each transaction has a tenant and a timeout: one more statement, `set_config`.",
        routes=("insert",),
        around=("BEGIN", "SELECT set_config", "COMMIT"),
    ),
    Contender(
        "FastAPI",
        f"{LIBRARY}, watched",
        partial(applications.this_library_watched, FRAMEWORKS["FastAPI"]),
        "Each request is reported, with its route in a comment of each statement: "
        "`ASGIRequestReportMiddleware`.",
    ),
    Contender(
        "FastAPI",
        f"{LIBRARY}, verify_commits",
        partial(applications.this_library, FRAMEWORKS["FastAPI"], verify_commits=True),
        "Asks for the number of each transaction, to look a lost COMMIT up: `verify_commits`.",
        option="verify_commits",
        routes=("select", "insert"),
        around=("BEGIN", "SELECT xid::text, concat_ws", "COMMIT"),
    ),
    Contender(
        "FastAPI",
        f"{LIBRARY}, limits",
        partial(applications.this_library_limited, FRAMEWORKS["FastAPI"]),
        "A deadline, also at the server, and an eye on the client: `RequestLimitsMiddleware` with "
        "`deadline_settings`.",
        routes=("select", "insert"),
    ),
    Contender(
        "FastAPI",
        f"{LIBRARY}, idempotency keys",
        partial(applications.this_library_with_keys, FRAMEWORKS["FastAPI"]),
        "Each request has a key, which is stored with its answer: `IdempotencyMiddleware`.",
        routes=("insert",),
        around=("BEGIN", "WITH before AS", "UPDATE bench_key SET status=$", "COMMIT"),
    ),
    _with_settings(LIBRARY),
    _with_settings(IN_FLIGHT, begin_with_first_statement=True),
    Contender(
        "FastAPI",
        "Depends, scope request",
        partial(applications.by_depends, "request"),
        "Commits after the response was sent; holds the connection until then.",
    ),
    Contender(
        "FastAPI",
        "Depends, scope function",
        partial(applications.by_depends, "function"),
        "Commits when the handler has returned, before the response; every layer passes the "
        "session on.",
    ),
    Contender(
        "FastAPI",
        VERSION_2.name,
        applications.by_version_2,
        "The version before this one: commits before the response starts; with a "
        "`BaseHTTPMiddleware`.",
    ),
    Contender(
        "FastAPI",
        "fastapi-async-sqlalchemy",
        applications.by_fastapi_async_sqlalchemy,
        "Commits before the response, which it holds back until the first part of the body.",
        "fastapi_async_sqlalchemy",
    ),
    Contender(
        "FastAPI",
        "advanced-alchemy",
        applications.by_advanced_alchemy,
        "Commits after the response was sent, and only logs a failure (as debug); the session is "
        "provided by a sync dependency, which FastAPI runs in a thread.",
        "advanced_alchemy",
    ),
    Contender(
        "FastAPI",
        "fastapi-sqla",
        applications.by_fastapi_sqla,
        "Commits before the response starts, then again at its end; the session is provided by a "
        "sync dependency, which FastAPI runs in a thread.",
        "fastapi_sqla",
    ),
]
BY_KEY = {contender.key: contender for contender in CONTENDERS}


def taking_part(*, partly: bool = False) -> list[Contender]:
    """Return the contenders that can take part here, with or without those for some routes only."""
    return [c for c in CONTENDERS if c.obstacle() is None and (partly or "five" in c.routes)]
