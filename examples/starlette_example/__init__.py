"""The workflows of a session in Starlette: a package, so that its tests import `.app` in any copy."""
