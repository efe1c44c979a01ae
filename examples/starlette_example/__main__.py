"""Serve the application; arguments are passed to uvicorn, such as `--port 8001`."""

import sys

import uvicorn

if __name__ == "__main__":
    uvicorn.main(["examples.starlette_example.app:app", *sys.argv[1:]])
