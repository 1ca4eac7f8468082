"""The first tables: users, keys, requests, images, usage, deliveries, audit."""

import sqlalchemy as sa
from alembic import op

from api.store.tables import Table

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes every table, the queue's one row, and the triggers that keep the audit append-only."""
    Table.metadata.create_all(op.get_bind())
    op.execute("INSERT INTO queue (id, virtual_time) VALUES (1, 0)")
    if op.get_bind().dialect.name == "sqlite":
        for what in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{what.lower()} BEFORE {what} ON audit "
                "BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END"
            )
        return
    op.execute(
        sa.text(
            "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the audit is append-only'; END $$"
        )
    )
    op.execute(
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()"
    )
