"""The errors of our own."""

from __future__ import annotations

import pickle

import pytest

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
)


@pytest.mark.parametrize(
    "cls",
    [
        CommitOutcomeUnknownError,
        ContextAlreadyInitiatedError,
        ContextClosedError,
        ContextNotInitiatedError,
    ],
)
def test_an_error_can_be_sent_to_another_process(cls: type[RuntimeError]) -> None:
    for error in (cls(), cls("a message of the user's")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error) != ""
