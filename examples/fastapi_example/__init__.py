"""The workflows of a session in FastAPI: a package, so that its tests import `.app` in any copy."""
