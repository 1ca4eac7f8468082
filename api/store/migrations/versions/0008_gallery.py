"""Pictures have stars, and a few pixels to be seen before they are."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the columns; pictures of before have no stars and no blur."""
    op.add_column("images", sa.Column("rating", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("images", sa.Column("blur", sa.LargeBinary(), nullable=True))
