"""The workflows of a session in Starlette: a package, because its tests import `.app`."""
