"""One transaction that is shared by a test and the application."""
