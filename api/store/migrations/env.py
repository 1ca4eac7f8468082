"""Runs the migrations: `api.store.database.migrate` hands the URL, which logs and configuration files never see."""

from alembic import context
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from api.store.database import check_known
from api.store.tables import Table

LOCK = 5_117_031  # any number, the same in every process

url = make_url(context.config.attributes["url"])
sqlite = url.get_backend_name() == "sqlite"
engine = create_engine(url.set(drivername="sqlite" if sqlite else "postgresql+psycopg"), poolclass=NullPool)
if sqlite:

    @event.listens_for(engine, "connect")
    def _own_transactions(connection, _):  # type: ignore[no-untyped-def]
        connection.isolation_level = None
        connection.execute("PRAGMA busy_timeout=30000")
        connection.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def _alone(connection):  # type: ignore[no-untyped-def]
        connection.exec_driver_sql("BEGIN IMMEDIATE")


with engine.begin() as connection:
    if not sqlite:  # two processes that start together migrate one after the other
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
    check_known(context.get_context().get_current_revision())
    context.run_migrations()
