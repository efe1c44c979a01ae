"""The workflows of a session in FastAPI: a package, because its tests import `.app`."""
