"""Users' own models, their versions, and the consents that they rest on."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Makes the tables; requests may train, and tell which versions drew; pictures remember them."""
    # Requests, then pictures, then users, whom the tables refer to: a server that runs takes their locks so, too.
    op.add_column("requests", sa.Column("kind", sa.String(length=10), nullable=False, server_default="draw"))
    op.add_column("requests", sa.Column("reached", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("requests", sa.Column("versions", sa.JSON(), nullable=True))
    op.add_column("requests", sa.Column("training", sa.JSON(), nullable=True))
    op.add_column("images", sa.Column("base_hash", sa.String(length=64), nullable=True))
    op.add_column("images", sa.Column("version_hash", sa.String(length=64), nullable=True))
    op.create_table(
        "models",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("token", sa.String(length=130), nullable=False),
        sa.Column("class_noun", sa.String(length=64), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("published_id", sa.String(length=28), nullable=True),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("user_id", "name"),
    )
    op.create_table(
        "model_versions",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("model_id", sa.String(length=28), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("base_hash", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("refusal", sa.Text(), nullable=True),
        sa.Column("request_id", sa.String(length=28), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("model_id", "number"),
    )
    op.create_table(
        "consents",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("model_id", sa.String(length=28), nullable=False),
        sa.Column("granted_by", sa.String(length=64), nullable=False),
        sa.Column("statement", sa.Integer(), nullable=False),
        sa.Column("evidence", sa.String(length=64), nullable=False),
        sa.Column("granted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_consents_model_id", "consents", ["model_id"], unique=False)
