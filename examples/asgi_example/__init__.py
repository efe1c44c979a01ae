"""The workflows of a session in pure ASGI: a package, so that its tests import `.app` in any copy."""
