"""Alembic's entry: the connection comes from who upgrades, inside their transaction."""

from __future__ import annotations

from alembic import context

from lorchestra.registry.sql.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
