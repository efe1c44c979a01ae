"""The fixtures are those of the FastAPI example."""

from examples.fastapi_example.tests.transactional.conftest import *  # noqa: F403
