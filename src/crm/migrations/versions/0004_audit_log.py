"""The audit log of operators' actions on the cache."""

from alembic import op

import respcache.writes.alembic  # noqa: F401  (op.create_respcache_trail)

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_respcache_trail()


def downgrade() -> None:
    op.drop_respcache_trail()
