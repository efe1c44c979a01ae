"""A package, so that pytest does not put it on the path, where `fastapi.py` would hide FastAPI."""
