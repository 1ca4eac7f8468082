"""Requests say in which lane they were drawn."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the column; until now every picture was drawn by diffusers' own call."""
    op.add_column("requests", sa.Column("lane", sa.String(length=10), nullable=True))
    op.execute("UPDATE requests SET lane = 'stock' WHERE status = 'succeeded'")
