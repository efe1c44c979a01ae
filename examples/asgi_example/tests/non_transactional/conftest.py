"""The fixtures are those of the FastAPI example."""

from examples.fastapi_example.tests.non_transactional.conftest import *  # noqa: F403
