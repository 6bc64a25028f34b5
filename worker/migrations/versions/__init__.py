"""Alembic migrations of the store. `Store.migrate()` runs them; nobody needs the alembic command."""
