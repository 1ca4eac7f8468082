"""The administrator's API on the wire."""

from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.config import UserId
from api.wire.accounts import Key, Limits, Line, Password
from api.wire.jobs import Status

Cap = Annotated[int, Field(ge=0, le=2**31 - 1)]


class OwnLimits(BaseModel):
    """Limits of one user; null takes the setting's, 0 is no limit."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    queued: Cap | None = Field(default=None, description="Jobs that may wait.", examples=[100])
    running: Cap | None = Field(default=None, description="Jobs that may run at once.", examples=[4])
    requests_per_minute: Cap | None = Field(default=None, description="Requests in a minute.", examples=[300])
    images_per_day: Cap | None = Field(default=None, description="Pictures in a day (UTC).", examples=[50])
    steps_per_day: Cap | None = Field(default=None, description="Denoising steps in a day (UTC).", examples=[None])


class NewUser(BaseModel):
    """A user to make."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    id: UserId = Field(description="Names the user everywhere, their model in USER_MODELS too.", examples=["ada"])
    name: Line | None = Field(default=None, description="For people; null is the id.", examples=["Ada"])
    login: Line | None = Field(
        default=None, description="To sign in with; null is the id where there is a password.", examples=["ada"]
    )
    password: Password | None = Field(
        default=None, description="At least 10 characters; null: by API keys alone.", examples=["correct horse battery"]
    )
    type: Literal["user", "admin"] = Field(default="user", description="What they are.", examples=["user"])
    limits: OwnLimits = Field(default_factory=OwnLimits, description="Limits other than the settings'.")


class UserChange(BaseModel):
    """What to change of a user; what is left away stays."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Line | None = Field(default=None, description="For people.", examples=["Ada L."])
    login: Line | None = Field(default=None, description="To sign in with.", examples=["ada"])
    password: Password | None = Field(
        default=None, description="A new one; ends every session.", examples=["correct horse battery"]
    )
    type: Literal["user", "admin"] | None = Field(default=None, description="What they are.", examples=["user"])
    disabled: bool | None = Field(
        default=None, description="True shuts them out at once: sessions, tokens and keys.", examples=[True]
    )
    limits: OwnLimits | None = Field(
        default=None,
        description="The limits that are named here change; null takes the setting's again.",
        examples=[{"images_per_day": 20}],
    )


class UserRow(BaseModel):
    """A user."""

    id: str = Field(description="Names the user everywhere.", examples=["ada"])
    name: str = Field(description="For people.", examples=["Ada"])
    login: str | None = Field(description="To sign in with; null: by API keys alone.", examples=["ada"])
    type: Literal["user", "admin"] = Field(description="What they are.", examples=["user"])
    disabled: bool = Field(description="Whether they are shut out.", examples=[False])
    limits: OwnLimits = Field(description="Limits other than the settings'.")
    created_at: datetime = Field(description="Since when.")


class UserDetail(UserRow):
    """A user, what is left of their limits, and their keys."""

    left: Limits = Field(description="Their limits in force, and what is left.")
    keys: list[Key] = Field(description="Newest first, revoked and expired ones too.")


class UserPage(BaseModel):
    """Users by id."""

    users: list[UserRow] = Field(description="At most `limit`.")
    after: str | None = Field(description="Pass it as `after` for the next page; null on the last.", examples=[None])


class RequestRow(BaseModel):
    """Somebody's request."""

    id: str = Field(description="Names the job.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    user_id: str = Field(description="Whose.", examples=["ada"])
    kind: Literal["draw", "train"] = Field(description="Whether it draws, or trains a model.", examples=["draw"])
    status: Status = Field(description="How far it is.", examples=["succeeded"])
    prompt: str | None = Field(description="What is drawn; null when it is sensitive.", examples=["sks person"])
    sensitive: bool = Field(description="Whether the prompt is kept encrypted.", examples=[False])
    model_id: str = Field(description="The model.", examples=["models/sitters/ada"])
    num_images: int = Field(description="Pictures asked for.", examples=[1])
    steps: int = Field(description="Denoising steps of them all.", examples=[30])
    phase: str | None = Field(description="While it runs: what it is at.", examples=["drawing"])
    step: int = Field(description="Steps done.", examples=[12])
    step_count: int = Field(description="Of how many, one picture's; 0 until they begin.", examples=[30])
    cancel_requested: bool = Field(description="Whether it was asked to stop.", examples=[False])
    priority: int = Field(description="Larger goes first.", examples=[0])
    attempt: int = Field(description="Times it was begun.", examples=[1])
    worker: str | None = Field(description="Who draws it, or drew it last.", examples=["host:4711"])
    error_code: str | None = Field(description="Why it failed.", examples=[None])
    error_detail: str | None = Field(description="Likewise, for people.", examples=[None])
    created_at: datetime = Field(description="When it was accepted.")
    started_at: datetime | None = Field(description="When it was last begun.")
    finished_at: datetime | None = Field(description="When it ended.")


class RequestPage(BaseModel):
    """Requests of everybody, newest first."""

    requests: list[RequestRow] = Field(description="At most `limit`.")
    before: str | None = Field(description="Pass it as `before` for the next page; null on the last.", examples=[None])


class UsageRow(BaseModel):
    """What a user used, or what was used on a day, or of a model."""

    user_id: str | None = Field(description="Who, with `by=user`.", examples=["ada"])
    day: date | None = Field(description="When (UTC), with `by=day`.", examples=[None])
    model_id: str | None = Field(
        description="Which, with `by=model`; null for requests that were erased.", examples=[None]
    )
    requests: int = Field(description="Requests that were drawn.", examples=[12])
    images: int = Field(description="Pictures.", examples=[20])
    steps: int = Field(description="Denoising steps.", examples=[600])
    seconds: float = Field(description="Time they took.", examples=[31.5])
    cost: float = Field(description="What paid providers took.", examples=[0.0])


class UsageReport(BaseModel):
    """Usage from one day to another, both included."""

    from_day: date = Field(description="The first day (UTC).")
    to_day: date = Field(description="The last day (UTC).")
    rows: list[UsageRow] = Field(description="Most steps first, or the oldest day first; 1000 at most.")


class AuditRow(BaseModel):
    """A line of the audit."""

    seq: int = Field(description="Its number.", examples=[17])
    at: str = Field(description="When (UTC).", examples=["2026-01-07T14:30:22.000001+00:00"])
    actor: str = Field(description="Who did it.", examples=["root"])
    action: str = Field(description="What was done.", examples=["key.revoked"])
    object: str = Field(description="What it was done to.", examples=["key:019a9f3c2d10b1946ac93f21d07e"])
    detail: dict[str, Any] = Field(description="More of it.", examples=[{}])
    hash: str = Field(description="Seals this line and all before it.", examples=["9f86d081884c7d65…"])


class AuditPage(BaseModel):
    """Lines of the audit, newest first."""

    lines: list[AuditRow] = Field(description="At most `limit`.")
    before: int | None = Field(description="Pass it as `before` for the next page; null on the last.", examples=[None])


class SettingsInForce(BaseModel):
    """The settings in force, secrets masked."""

    settings: dict[str, Any] = Field(description="By name.", examples=[{"PORT": 8000, "HF_TOKEN": "**********"}])
    origins: dict[str, str] = Field(
        description="Where each was read that does not have its default.", examples=[{"PORT": "the environment"}]
    )
