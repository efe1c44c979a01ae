"""No password is logged, whatever text it stands in, and however long that is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings, strategies as st

from context_async_sqlalchemy._engine.log import hide_password


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://app:hunter2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:h@nter2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:hun ter2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app@db/shop", "postgresql://app@db/shop"),
        ("redis://:hunter2@db", "redis://:***@db"),
        ("a\nx://u:hunter2@db\nb@c\n", "a\nx://u:***@c\n"),
        ("x://u:hunter2\nhunter2@db", "x://u:***@db"),
        ("x://a user:hunter2@db", "x://a user:***@db"),
        ("x://u:a@b?hunter2@db", "x://u:***@db"),
        ("user:hunter2@host", "user:***@host"),
        ("no host 'user:hunter2@host'", "no host 'user:***@host'"),
        ("host:5432, [::1]:5432", "host:5432, [::1]:5432"),
        ("{'password': 'hunter2', 'user': 'app'}", "{'password': ***, 'user': 'app'}"),
        ('{"password": "hunter2"}', '{"password": ***}'),
        ("password=SecretStr('hunter2')", "password=SecretStr(***)"),
        ("ALTER ROLE app PASSWORD 'hunt''hunter2'", "ALTER ROLE app PASSWORD ***"),
        ("passwd: hunter2", "passwd: ***"),
        ("for 'app'@'db' (using password: YES)", "for 'app'@'db' (using password: YES)"),
        ("x://u:hunter2@h?password=hunter2", "x://u:***@h?password=***"),
        ("h?user=app&password=hunter2&x=1", "h?user=app&password=***&x=1"),
        ("mysql://h/db?passwd=hunter2&charset=x", "mysql://h/db?passwd=***&charset=x"),
        ("h?sslpassword=hunter2&passfile=/a", "h?sslpassword=***&passfile=/a"),
        ("oauth_client_secret=hunter2 scram_client_key=hunter2", None),
        ("scram_server_key=hunter2 newpassword=hunter2", None),
        ("host=db password=hunter2", "host=db password=***"),
        (r"host=db PASSWORD = 'hun\'ter 2' user=app", "host=db PASSWORD = *** user=app"),
        ("password='hunter2\nhunter2' user=app", "password=*** user=app"),
        ("password='never closed hunter2", "password=***"),
        ("password='hunter2\\", "password=***"),
        ("Driver={ODBC};PWD={hunter2; hunter2};X=1", "Driver={ODBC};PWD=***;X=1"),
        ("PWD={hunter2 hunter2", "PWD=***"),
        ("no password for user app", "no password for user app"),
        ("sslkey=/a passfile=/b", "sslkey=/a passfile=/b"),
        ("", ""),
    ],
)
def test_passwords_are_hidden_wherever_they_stand(text: str, shown: str | None) -> None:
    hidden = hide_password(text)
    assert "hunter2" not in hidden
    assert shown in (hidden, None)


def test_a_password_that_is_known_is_hidden_anywhere() -> None:
    assert hide_password("login of hunter2 failed", "hunter2") == "login of *** failed"


ANY = st.text("ab1:/@?#&=%,; \n\t\\'\"{}[]()ü", max_size=8)
NO_BLANK = st.text("ab1:/@?#=%,;\\[]()ü", max_size=8)
MARK = "telltale"


def libpq(secret: str) -> str:
    escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
    return f"host=db password = '{escaped}' user=app"


PLACES: dict[str, tuple[st.SearchStrategy[str], Callable[[str], str]]] = {
    "url": (ANY, lambda secret: f"postgresql://a user:{secret}@db:5432/shop?x=y"),
    "no scheme": (ANY, lambda secret: f"app:{secret}@db"),
    "query": (NO_BLANK, lambda secret: f"h/db?user=app&password={secret}&x=y"),
    "encoded": (ANY, lambda secret: f"h/db?passwd={quote(secret, safe='')}"),
    "repr": (ANY, lambda secret: repr({"password": secret, "user": "app"})),
    "keyword": (ANY, lambda secret: f"connect(password={secret!r}, user='app')"),
    "json": (ANY, lambda secret: json.dumps({"db_password": secret, "user": "app"})),
    "libpq": (ANY, libpq),
    "odbc": (ANY, lambda secret: "PWD={" + secret.replace("}", "}}") + "};X=1"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_that_was_put_in_never_comes_out(place: str) -> None:
    parts, write = PLACES[place]

    @settings(max_examples=80, deadline=None, database=None)
    @given(
        before=st.text("ab:/@?&= \n", max_size=8),
        start=parts,
        end=parts,
        after=st.text("ab:/?&= \n'}", max_size=8),
        filling=st.sampled_from([0, 0, *range(9_950, 10_001, 3)]),
    )
    def check(before: str, start: str, end: str, after: str, filling: int) -> None:
        assume(not start.startswith("/"))  # app://… has a scheme, and no password
        text = "a" * filling + before + write(start + MARK + end) + after
        shown = hide_password(text)
        assert MARK[:4] not in shown
        assert len(shown) < 11_000

    check()


@settings(max_examples=100, deadline=None, database=None)
@given(text=ANY, start=ANY, end=ANY, filling=st.sampled_from([0, 0, *range(9_980, 10_001, 3)]))
def test_a_known_secret_is_hidden_in_any_text(
    text: str, start: str, end: str, filling: int
) -> None:
    secret = start + MARK + end
    for written in (secret, repr(secret), quote(secret, safe="")):
        whole = "a" * filling + text + written + text
        assert MARK[:4] not in hide_password(whole, secret)


def test_a_long_text_is_cut() -> None:
    assert hide_password("a" * 10_000) == "a" * 10_000
    assert hide_password("a" * 10_001) == "a" * 10_000 + "… (10001 characters)"


@pytest.mark.parametrize(
    "part",
    [
        "://a:",
        "://",
        "://a:@\n",
        "://a",
        ":",
        "@",
        "password",
        "password ",
        "password='",
        "password=\\'",
        "password='\\'",
        "password={",
        "pwd=",
        "secret = ",
        "passwd\t",
        "'",
        "\\",
        "a",
        " ",
    ],
)
@pytest.mark.parametrize(("start", "end"), [("", ""), ("://u:password='", ""), ("", "@'}")])
def test_a_megabyte_is_read_once(start: str, part: str, end: str) -> None:
    text = start + part * (1_000_000 // len(part)) + end
    before = time.process_time()
    hide_password(text, "known")
    assert time.process_time() - before < 0.5  # a few milliseconds; what is not linear takes hours
