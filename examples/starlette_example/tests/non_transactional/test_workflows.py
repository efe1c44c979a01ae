"""The workflows do the same as in the FastAPI example."""

from examples.fastapi_example.tests.non_transactional.test_workflows import *  # noqa: F403
