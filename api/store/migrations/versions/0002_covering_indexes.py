"""The queue's indexes hold what is summed over them: a long queue is counted without reading its rows."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Makes both indexes anew, with the columns that are summed."""
    queued = sa.text("status = 'queued'")
    active = sa.text("status IN ('queued', 'running')")
    op.drop_index("requests_queued", "requests")
    op.drop_index("requests_active", "requests")
    op.create_index(
        "requests_queued",
        "requests",
        [sa.text("priority DESC"), "start_tag", "id", "work"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
    op.create_index(
        "requests_active",
        "requests",
        ["user_id", "status", "images", "steps"],
        sqlite_where=active,
        postgresql_where=active,
    )
