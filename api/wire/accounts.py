"""Signing in, one's own account and its keys, on the wire."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from api.config import UserId
from api.wire.text import Text


def _encodable(secret: SecretStr) -> SecretStr:
    try:
        secret.get_secret_value().encode()
    except UnicodeEncodeError:
        raise ValueError("it has half a character (a lone surrogate)") from None  # the cause holds the password
    return secret


Scope = Literal["draw", "read", "manage", "admin"]
LimitName = Literal["queued", "running", "requests_per_minute", "images_per_day", "steps_per_day"]
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\u0000-\u001f\u007f-\u009f]+$")]
GivenPassword = Annotated[SecretStr, Field(min_length=1, max_length=200), AfterValidator(_encodable)]
Password = Annotated[SecretStr, Field(min_length=10, max_length=200), AfterValidator(_encodable)]
Id = Annotated[str, Field(pattern="^[0-9a-f]{28}$")]

SCOPES = Field(
    description="`draw`: make and cancel jobs. `read`: jobs, images, this account. `manage`: keys, password, export, "
    "erase. `admin`: the administrator's API, for administrators alone.",
    examples=[["draw", "read"]],
)


class _Sent(BaseModel):
    """Base of what callers send."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class SignIn(_Sent):
    """A login and its password."""

    login: Line = Field(description="The user's login.", examples=["ada"])
    password: GivenPassword = Field(description="The password.", examples=["correct horse battery"])
    session: bool = Field(
        default=False,
        description="For a web page: set a session cookie (12 hours) and answer its `csrf_token`.",
        examples=[False],
    )


class SignedIn(BaseModel):
    """A token, and what goes with it."""

    access_token: str | None = Field(
        description="Send it as `Authorization: Bearer …`; null when a session was asked for.", examples=["eyJhbGci…"]
    )
    token_type: Literal["bearer"] = Field(default="bearer", description="Always `bearer`.", examples=["bearer"])
    expires_in: int = Field(description="Seconds until it ends.", examples=[900])
    csrf_token: str | None = Field(
        description="Of a session: send it as `X-CSRF-Token` with everything that changes something.", examples=[None]
    )


class SignOut(_Sent):
    """What to end."""

    everywhere: bool = Field(
        default=False, description="End every session and token of yours, not this one alone.", examples=[False]
    )


class SetUp(_Sent):
    """The first administrator, made with the link that the server printed."""

    token: Text = Field(max_length=100, description="What stands behind `#` in the link.", examples=["Jx3v…"])
    user_id: UserId = Field(description="Names the user everywhere.", examples=["root"])
    login: Line | None = Field(default=None, description="To sign in with; null is the `user_id`.", examples=[None])
    password: Password = Field(description="At least 10 characters.", examples=["correct horse battery"])


class PasswordChange(_Sent):
    """A new password."""

    current_password: GivenPassword = Field(description="The password until now.", examples=["correct horse battery"])
    new_password: Password = Field(description="At least 10 characters.", examples=["staple battery horse"])


class LimitLeft(BaseModel):
    """One limit, and what is left of it."""

    limit: int | None = Field(description="Its size; null is no limit.", examples=[100])
    used: int = Field(description="What is used of it.", examples=[3])
    left: int | None = Field(description="What is left; null without a limit.", examples=[97])
    resets_at: datetime | None = Field(
        description="When it counts from 0 again; null where it goes down as jobs end.", examples=[None]
    )


Limits = dict[LimitName, LimitLeft]


class Me(BaseModel):
    """Who you are, and what you may use."""

    user_id: str | None = Field(description="Your user; null with AUTH=open, where nobody signs in.", examples=["ada"])
    name: str | None = Field(description="Your name.", examples=["Ada"])
    type: Literal["user", "admin"] = Field(description="What you are.", examples=["user"])
    via: Literal["open", "key", "token", "session"] = Field(description="How you said so.", examples=["key"])
    scopes: list[Scope] = Field(description="What this credential allows.", examples=[["draw", "read"]])
    limits: Limits = Field(description="Your limits; with AUTH=open those of `default`.")
    csrf_token: str | None = Field(description="Of a session: what to send as `X-CSRF-Token`.", examples=[None])


class NewKey(_Sent):
    """An API key to make."""

    name: Line = Field(description="What it is for.", examples=["laptop"])
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)] = Field(
        default=["draw", "read"], description=SCOPES.description, examples=[["draw", "read"]]
    )
    days: int | None = Field(
        default=None, ge=1, le=3650, description="Days until it expires; null is never.", examples=[90]
    )


class Key(BaseModel):
    """An API key, without its secret."""

    id: str = Field(description="Names the key.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    name: str = Field(description="What it is for.", examples=["laptop"])
    prefix: str = Field(description="How it begins.", examples=["sk_3fK9x2a"])
    scopes: list[Scope] = SCOPES
    created_at: datetime = Field(description="When it was made.")
    expires_at: datetime | None = Field(description="When it ends; null is never.")
    revoked_at: datetime | None = Field(description="When it was revoked.")
    last_used_at: datetime | None = Field(description="When it was last used, within a minute.")


class MadeKey(Key):
    """A new API key. Its secret is shown here and never again."""

    key: str = Field(description="The key: keep it, it is not shown again.", examples=["sk_3fK9x2a…"])


class KeyList(BaseModel):
    """API keys, newest first."""

    keys: list[Key] = Field(description="Revoked and expired ones too.")
