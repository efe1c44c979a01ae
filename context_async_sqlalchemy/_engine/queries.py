"""The statements that a block has sent, counted."""

from collections.abc import Sequence
from typing import Self

from context_async_sqlalchemy._engine.observed import Kind, Observer, Step, listen, observe


class count_queries:  # noqa: N801  # used as a function
    """Count the statements that a block sends, and the tasks that it starts, to any database.

        async with count_queries() as queries:
            await client.post("/members/ann")
        assert len(queries) <= 3, queries.statements

    Those that fail count, too. `executemany()` is one statement, or as many as SQLAlchemy makes of
    it, and a streamed result is one. What begins and ends a transaction or a savepoint does not
    count: in a test it may be another one. It also works with `with`.

    Attributes:
        statements: Their texts, in the order they were sent; without parameters.
    """

    def __init__(self) -> None:
        self.statements: list[str] = []

    def __len__(self) -> int:
        return len(self.statements)

    def __repr__(self) -> str:
        return f"<{len(self)} queries>"

    def __enter__(self) -> Self:
        listen()
        self._collector = _Collector(self.statements)
        self._observing = observe(self._collector)
        self._observing.__enter__()
        return self

    def __exit__(self, cls: type[BaseException] | None, *_: object) -> None:
        self._collector.has_ended = True
        self._observing.__exit__(None, None, None)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, cls: type[BaseException] | None, *_: object) -> None:
        self.__exit__(cls)


class assert_queries(count_queries):  # noqa: N801
    """Fail if a block does not send exactly this many statements; it counts as `count_queries`.

        with assert_queries(1):
            await client.post("/members/ann")

    Args:
        expected: The number of statements.

    Raises:
        AssertionError: At the end of the block, with the statements that were sent.
    """

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected = expected

    def __exit__(self, cls: type[BaseException] | None, *_: object) -> None:
        super().__exit__(cls)
        if cls is None and len(self) != self.expected:
            raise AssertionError(
                f"{self.expected} queries were expected, and {len(self)} were sent"
                f"{_listed(self.statements)}"
            )


def _listed(statements: Sequence[str]) -> str:
    lines = (f"\n  {n}. {' '.join(text.split())}" for n, text in enumerate(statements, 1))
    return f":{''.join(lines)}" if statements else ""


class _Collector(Observer):
    def __init__(self, statements: list[str]) -> None:
        self._statements = statements
        self.has_ended = False  # and takes nothing from a task that outlives the block

    def began(self, step: Step) -> None:
        if step.kind is Kind.STATEMENT and not self.has_ended:
            self._statements.append(step.text)
