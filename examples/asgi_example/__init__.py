"""The workflows of a session in pure ASGI: a package, because its tests import `.app`."""
