"""From a database URL to an engine for each event loop, and its connections home again."""
