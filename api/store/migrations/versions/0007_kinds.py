"""The queue's index knows what a job does: a drawing's place is counted past thousands of trainings."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Makes the index anew."""
    queued = sa.text("status = 'queued'")
    op.drop_index("requests_queued", "requests")
    op.create_index(
        "requests_queued",
        "requests",
        [sa.text("priority DESC"), "start_tag", "id", "kind", "work"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
