"""The cache's outbox, and the triggers that fill it."""

from alembic import op

import respcache.writes.alembic  # noqa: F401  (op.watch_table)

revision = "0003"
down_revision = "0002"

TABLES = (
    "accounts",
    "activities",
    "bizdev_sources",
    "contacts",
    "documents",
    "employees",
    "leads",
    "opportunities",
    "tasks",
    "teams",
)


def upgrade() -> None:
    op.create_respcache_outbox()
    for table in TABLES:
        op.watch_table(table, tenant_column="tenant_id", shared=False)
    op.watch_table("tenants", tenant_column="id", shared=True)


def downgrade() -> None:
    op.unwatch_table("tenants")
    for table in reversed(TABLES):
        op.unwatch_table(table)
    op.drop_respcache_outbox()
