"""Pictures have stars, and a few pixels to be seen before they are; a day of the ledger is found by itself."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the columns; pictures of before have no stars and no blur. Their table first: so does who publishes."""
    op.add_column("images", sa.Column("rating", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("images", sa.Column("blur", sa.LargeBinary(), nullable=True))
    op.create_index("usage_by_day", "usage", ["created_at"])
