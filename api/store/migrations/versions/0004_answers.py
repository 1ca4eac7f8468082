"""What Idempotency-Keys were answered is kept for a day."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "answers",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("caller", sa.String(length=64), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("caller", "idempotency_key"),
    )
    op.create_index("ix_answers_created_at", "answers", ["created_at"], unique=False)
    op.create_index("ix_answers_subject", "answers", ["subject"], unique=False)
