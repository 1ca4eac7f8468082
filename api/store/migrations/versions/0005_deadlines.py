"""A request may have a deadline."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the column, and an index of those that wait with one."""
    op.add_column("requests", sa.Column("deadline", sa.DateTime(timezone=True), nullable=True))
    waiting = sa.text("status = 'queued' AND deadline IS NOT NULL")
    op.create_index("requests_with_deadline", "requests", ["deadline"], sqlite_where=waiting, postgresql_where=waiting)
