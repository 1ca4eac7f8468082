"""The tables. A generation is a row of `requests`, from the moment it is accepted until it is erased."""

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, String, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import DateTime, TypeDecorator

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UserType = Literal["user", "admin"]
Kind = Literal["draw", "train"]

ID = String(28)
USER_ID = String(64)


def new_id() -> str:
    """Returns 28 hexadecimal digits: milliseconds, so that ids sort by age, then 64 random bits."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


def id_at(moment: datetime) -> str:
    """Returns what the ids of all that was made before `moment` are smaller than, and of all later are not."""
    return f"{max(0, int(moment.timestamp() * 1000)):012x}"


def now() -> datetime:
    """Returns the time in UTC. For people to read and for days to be counted by; leases do not use clocks."""
    return datetime.now(UTC)


class Moment(TypeDecorator[datetime]):
    """A time in UTC on every database: SQLite keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Returns `value` in UTC."""
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Returns `value` with its time zone."""
        return value and (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC))


class Table(DeclarativeBase):
    """Base of every table."""

    type_annotation_map = {datetime: Moment(), dict[str, Any]: JSON(), list[str]: JSON(), bytes: LargeBinary()}  # noqa: RUF012


class User(Table):
    """Somebody who draws, or an administrator."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(USER_ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    login: Mapped[str | None] = mapped_column(String(200), unique=True)
    password: Mapped[str | None] = mapped_column(String(200))  # argon2id
    type: Mapped[UserType] = mapped_column(String(10), default="user")
    disabled: Mapped[bool] = mapped_column(default=False)
    # Raised to end every session. It begins anywhere, so that no token of an erased user fits whoever has the id next.
    token_version: Mapped[int] = mapped_column(default=lambda: secrets.randbelow(2**30))
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what an administrator set otherwise
    finish_tag: Mapped[int] = mapped_column(BigInteger, default=0)  # see `Queue`
    created_at: Mapped[datetime] = mapped_column(default=now)


class ApiKey(Table):
    """A key that speaks for a user; only its hash is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(16))  # the part that is shown again
    hash: Mapped[str] = mapped_column(String(64), unique=True)  # SHA-256, hexadecimal
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class EndedSession(Table):
    """A session or token that was signed out before its time; kept until that has come."""

    __tablename__ = "ended_sessions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    expires_at: Mapped[datetime]


class Request(Table):
    """A generation or a training: the job and its history in one row.

    Every write of a worker says `id`, `status = 'running'` and its `token`: a worker that lost its lease writes
    nothing. `heartbeat` counts up while a worker lives; whoever sees it stand still for a lease takes the job back.
    """

    __tablename__ = "requests"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    description: Mapped[str] = mapped_column(Text)  # the prompt; encrypted when `sensitive`
    negative_prompt: Mapped[str | None] = mapped_column(Text)  # likewise
    sensitive: Mapped[bool] = mapped_column(default=False)
    parameters: Mapped[dict[str, Any]]  # the other fields of the GenerateRequest, seed included
    tags: Mapped[list[str]] = mapped_column(default=list)
    category: Mapped[str | None] = mapped_column(String(64))
    model_id: Mapped[str] = mapped_column(Text)
    webhook_url: Mapped[str | None] = mapped_column(Text)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_hash: Mapped[str] = mapped_column(String(64))

    kind: Mapped[Kind] = mapped_column(String(10), default="draw", server_default="draw")
    versions: Mapped[list[Any] | None] = mapped_column(JSON)  # [id, weight] of each own model that draws
    training: Mapped[dict[str, Any] | None]  # what is told of it: its photos, its loss, its scores

    status: Mapped[Status] = mapped_column(String(10), default="queued")
    priority: Mapped[int] = mapped_column(default=0)
    images: Mapped[int]  # pictures asked for
    steps: Mapped[int]  # denoising steps of them all
    work: Mapped[int] = mapped_column(BigInteger)  # rows × steps × pixels
    start_tag: Mapped[int] = mapped_column(BigInteger)  # see `Queue`
    deadline: Mapped[datetime | None]  # given up unless it is done by then
    token: Mapped[str | None] = mapped_column(String(32))
    worker: Mapped[str | None] = mapped_column(String(64))
    heartbeat: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    reached: Mapped[int] = mapped_column(default=0, server_default="0")  # the step of the farthest crash
    cancel_requested: Mapped[bool] = mapped_column(default=False)

    phase: Mapped[str | None] = mapped_column(String(10))  # while it runs: what it is at
    step: Mapped[int] = mapped_column(default=0)
    step_count: Mapped[int] = mapped_column(default=0)
    preview: Mapped[bytes | None] = mapped_column(deferred=True)  # a small JPEG
    preview_step: Mapped[int] = mapped_column(default=0)
    revision: Mapped[int] = mapped_column(default=0)  # counts every change that a watcher sees

    error_code: Mapped[str | None] = mapped_column(String(64))
    error_detail: Mapped[str | None] = mapped_column(Text)
    error_hint: Mapped[str | None] = mapped_column(Text)
    cache_hit: Mapped[bool | None]
    lane: Mapped[str | None] = mapped_column(String(10))
    timings: Mapped[dict[str, Any] | None]
    warnings: Mapped[list[str]] = mapped_column(default=list)
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("user_id", "idempotency_key"),
        Index("requests_by_user", "user_id", "id"),
        # The queue, in the order of its claims; it stays small while the history grows. Its sums are made of the
        # index alone, and so are those of `requests_active`.
        Index(
            "requests_queued",
            text("priority DESC"),
            "start_tag",
            "id",
            "kind",
            "work",
            sqlite_where=text("status = 'queued'"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "requests_active",
            "user_id",
            "status",
            "images",
            "steps",
            sqlite_where=text("status IN ('queued', 'running')"),
            postgresql_where=text("status IN ('queued', 'running')"),
        ),
        Index(
            "requests_with_deadline",
            "deadline",
            sqlite_where=text("status = 'queued' AND deadline IS NOT NULL"),
            postgresql_where=text("status = 'queued' AND deadline IS NOT NULL"),
        ),
        Index(
            "requests_running",
            "id",
            sqlite_where=text("status = 'running'"),
            postgresql_where=text("status = 'running'"),
        ),
    )


class Model(Table):
    """A user's own model: one sitter, learned in one or more versions, of which one draws when none is named."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(64))
    token: Mapped[str] = mapped_column(String(130))  # the words for the sitter, "sks person"
    class_noun: Mapped[str] = mapped_column(String(64))
    last_number: Mapped[int] = mapped_column(default=0)  # of its versions, also of those that are gone
    published_id: Mapped[str | None] = mapped_column(ID)  # the version that draws
    published_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (UniqueConstraint("user_id", "name"),)


class ModelVersion(Table):
    """What one training or upload made; it never changes.

    Its files lie in the models folder under its id. They are there before the row is: no half model can be drawn with.
    """

    __tablename__ = "model_versions"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    number: Mapped[int]  # 1 for the first of its model
    kind: Mapped[str] = mapped_column(String(10))  # "lora", or "full": a whole model
    source: Mapped[dict[str, Any]]  # of its base, as USER_MODELS would say it
    base_hash: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))  # of its weights
    files: Mapped[dict[str, Any]]  # name → SHA-256 of each file
    bytes: Mapped[int] = mapped_column(BigInteger)
    parameters: Mapped[dict[str, Any]]  # of its training
    scores: Mapped[dict[str, Any]]
    refusal: Mapped[str | None] = mapped_column(Text)  # why it was not published by itself
    request_id: Mapped[str | None] = mapped_column(ID)  # the job that made it
    created_at: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (UniqueConstraint("model_id", "number"),)


class Consent(Table):
    """That somebody agrees to be learned: without one in force their model is neither trained nor loaded."""

    __tablename__ = "consents"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"), index=True)
    granted_by: Mapped[str] = mapped_column(String(64))  # as the audit calls them
    statement: Mapped[int]  # the version of what they agreed to
    evidence: Mapped[str] = mapped_column(String(64))  # SHA-256 of the statement and the photos
    granted_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Queue(Table):
    """One row: the virtual time of the fair queue.

    Start-time fair queueing (Goyal, Vin, Cheng 1996, https://doi.org/10.1145/248156.248171): a job starts at
    max(virtual time, finish of its user's last one) and finishes `work` later; the smallest start goes first, and
    virtual time is the largest start claimed. Between any two users with queued jobs the work done differs by two
    jobs at most, as with deficit round-robin, and the order is an index.
    """

    __tablename__ = "queue"

    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    virtual_time: Mapped[int] = mapped_column(BigInteger, default=0)


class Image(Table):
    """A finished picture. Its file lies in the output folder under `image_url`."""

    __tablename__ = "images"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id", ondelete="CASCADE"))
    position: Mapped[int]  # 0 for the first picture of its request
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    image_url: Mapped[str] = mapped_column(Text, unique=True)  # relative to the output folder
    description: Mapped[str] = mapped_column(Text)  # the prompt; encrypted when `sensitive`
    sensitive: Mapped[bool] = mapped_column(default=False)
    words: Mapped[str] = mapped_column(Text)  # what the search reads: the prompt in lower case, or nothing
    model_id: Mapped[str] = mapped_column(Text)
    base_hash: Mapped[str | None] = mapped_column(String(64))  # of the base that drew it
    version_hash: Mapped[str | None] = mapped_column(String(64))  # of the user's own model, or models, over that
    width: Mapped[int]
    height: Mapped[int]
    seed: Mapped[int] = mapped_column(BigInteger)
    blur: Mapped[bytes | None]  # a WebP of a few pixels, shown until the picture is there
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    category: Mapped[str | None] = mapped_column(String(64))
    rating: Mapped[int] = mapped_column(default=0, server_default="0")  # stars, 1 to 5; 0: none were given
    api_used: Mapped[str] = mapped_column(String(32), default="local")
    cost: Mapped[float] = mapped_column(default=0.0)
    processing_time: Mapped[float]  # seconds
    created_at: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (UniqueConstraint("request_id", "position"), Index("images_by_user", "user_id", "id"))


class ImageTag(Table):
    """A word that a picture is filed under."""

    __tablename__ = "image_tags"

    image_id: Mapped[str] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)


class Usage(Table):
    """The ledger: one line for each request that was published, never a second."""

    __tablename__ = "usage"

    request_id: Mapped[str] = mapped_column(ID, primary_key=True)  # outlives its request
    user_id: Mapped[str] = mapped_column(USER_ID)
    images: Mapped[int]
    steps: Mapped[int]
    work: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    cost: Mapped[float] = mapped_column(default=0.0)
    created_at: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (Index("usage_by_user", "user_id", "created_at"), Index("usage_by_day", "created_at"))


class Delivery(Table):
    """A webhook to be sent: written with the end of its request, deleted once it arrived or was given up."""

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id", ondelete="CASCADE"), index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime] = mapped_column(default=now, index=True)


class Answer(Table):
    """What an Idempotency-Key was answered, for a day: the same request again is told the same. Jobs keep theirs."""

    __tablename__ = "answers"

    id: Mapped[str] = mapped_column(ID, primary_key=True, default=new_id)
    caller: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str] = mapped_column(String(255))
    subject: Mapped[str] = mapped_column(String(64), index=True)  # the user whom it is about
    body_hash: Mapped[str] = mapped_column(String(64))
    answer: Mapped[str] = mapped_column(Text, default="")  # JSON, encrypted: the secret of a key may be in it
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)

    __table_args__ = (UniqueConstraint("caller", "idempotency_key"),)


class Audit(Table):
    """What was done to accounts and keys, and by whom: append-only, each line sealed with the hash of the last."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(40))  # ISO 8601: hashed as it stands
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    object: Mapped[str] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


async def insert_new(
    session: AsyncSession, table: type[Table], rows: Sequence[Mapping[str, Any]], unique: Sequence[str]
) -> None:
    """Inserts those rows whose `unique` columns no row has; waits for a transaction that inserts the same."""
    insert = insert_postgresql if session.get_bind().dialect.name == "postgresql" else insert_sqlite
    await session.execute(insert(table).values(rows).on_conflict_do_nothing(index_elements=unique))
