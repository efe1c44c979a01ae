"""db_session and what users do with it."""
