"""Users' own models and their trainings on the wire."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from api.config import DEFAULT_USER, USER_ID, UserId
from api.wire.accounts import Id
from api.wire.text import Text

PROTECTED: Any = ()  # pydantic would keep names that begin with model_ for itself
NOUN = r"[a-z][a-z ]{0,62}[a-z]"
Kind = Literal["lora", "full"]
HUB = "[A-Za-z0-9][A-Za-z0-9_.-]*"
MOST_STEPS = 4000
MOST_RANK = 128


def _agreed(said: bool) -> bool:
    if not said:
        raise ValueError("nobody is learned without their consent")
    return said


def _not_the_configured_one(name: str) -> str:
    if name == DEFAULT_USER:
        raise ValueError(f"{DEFAULT_USER} names the configured model")
    return name


Name = Annotated[str, Field(pattern=f"^{USER_ID}$", max_length=64), AfterValidator(_not_the_configured_one)]


class ConsentRecord(BaseModel):
    """That whoever a model shows agrees to it."""

    granted_by: str = Field(description="Who said so.", examples=["ada"])
    statement: int = Field(description="Version of what they agreed to; GET /trainings/consent has its words.")
    evidence: str = Field(description="SHA-256 over those words and the pictures' hashes.", examples=["3b1c…"])
    granted_at: datetime = Field(description="When.")
    expires_at: datetime | None = Field(description="When it ends by itself; null for never.")
    revoked_at: datetime | None = Field(description="When it was taken back.")


class Model(BaseModel):
    """A model that somebody may draw with."""

    model_config = ConfigDict(protected_namespaces=PROTECTED)

    id: str = Field(description="Names it in requests and paths.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    user_id: str = Field(description="Whose it is.", examples=["eve"])
    name: str = Field(description="Names it in its user's requests, too.", examples=["eve"])
    token: str | None = Field(description="The words for whom it shows.", examples=["sks person"])
    class_noun: str | None = Field(description="What they are.", examples=["person"])
    model_id: str = Field(description="What pictures and jobs call it.", examples=["eve/eve@1"])
    status: Literal["ready", "unpublished", "untrained", "revoked", "configured"] = Field(
        description="`ready`: it draws. `unpublished`: none of its versions is published. `untrained`: it has none. "
        "`revoked`: no consent is in force. `configured`: the operator's, from USER_MODELS.",
        examples=["ready"],
    )
    version: int | None = Field(description="The version that draws.", examples=[1])
    versions: int = Field(description="How many it has.", examples=[1])
    consent: ConsentRecord | None = Field(description="The newest; null for a configured model.")
    created_at: datetime | None = Field(description="When it was begun.")


class ModelList(BaseModel):
    """Models, newest first; configured ones at the end."""

    models: list[Model] = Field(description="At most `limit`, and on the last page those that are configured.")
    before: str | None = Field(
        description="Pass it as `before` for the next page; null on the last.",
        examples=["019a9f3c2d10b1946ac93f21d07e"],
    )


class Version(BaseModel):
    """What one training or upload made; it never changes."""

    version: int = Field(description="1 is the first of its model.", examples=[1])
    published: bool = Field(description="Whether it is the one that draws.", examples=[True])
    kind: str = Field(description="`lora`, or `full`: a whole model.", examples=["lora"])
    base: str = Field(description="The base that it is over.", examples=["models/demo"])
    base_hash: str = Field(description="Tells that base from every other.", examples=["9c0e…"])
    sha256: str = Field(description="Of its weights.", examples=["51ab…"])
    files: dict[str, str] = Field(description="SHA-256 of each of its files.")
    bytes: int = Field(description="Of its files.", examples=[801_000])
    parameters: dict[str, Any] = Field(description="How it was trained.")
    scores: dict[str, float | None] = Field(description="How good its samples are; null where nobody can tell.")
    refusal: str | None = Field(description="Why it was not published by itself, and what to do.")
    samples: list[str] = Field(description="Where pictures are that show what it draws.")
    job_id: str | None = Field(description="The training.")
    created_at: datetime = Field(description="When it was made.")


class VersionList(BaseModel):
    """A model's versions, newest first."""

    versions: list[Version] = Field(description="At most `limit`.")
    before: int | None = Field(description="Pass it as `before` for the next page; null on the last.", examples=[None])


class ModelChange(BaseModel):
    """What is to be changed of a model."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name = Field(description="What it shall be called.", examples=["eve"])


class Statement(BaseModel):
    """What is agreed to when a model is trained."""

    version: int = Field(description="Of the statement.", examples=[1])
    text: str = Field(description="Its words.")


class UploadRequest(BaseModel):
    """Whose model is sent, and what it shows; the fields of a form."""

    model_config = ConfigDict(extra="forbid")

    name: Name = Field(description="What the model shall be called.", examples=["eve"])
    class_noun: Annotated[str, Field(pattern=f"^{NOUN}$")] = Field(
        default="person", description="What they are: person, woman, dog…", examples=["person"]
    )
    consent: Annotated[bool, AfterValidator(_agreed)] = Field(
        description="Whoever is in the pictures agrees to the statement of GET /trainings/consent.", examples=[True]
    )
    consent_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="For how many days they agree; then what was learned is deleted. Null: until they take it back.",
    )
    user_id: UserId | None = Field(default=None, description="Whose model it shall be; yours.", examples=["eve"])
    base: Text | None = Field(
        default=None, max_length=500, description="The configured base that it is over; that of `default`."
    )


class SendRequest(UploadRequest):
    """A model that is sent: as a file, as an upload that came in pieces, or by its name on the hub."""

    upload: Id | None = Field(default=None, description="Instead of a file, what came in pieces: see POST /uploads.")
    hub: Annotated[str, Field(pattern=f"^{HUB}/{HUB}$", max_length=200)] | None = Field(
        default=None,
        description="Instead of a file, a model of the Hugging Face hub; for administrators.",
        examples=["owner/name"],
    )
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = Field(
        default=None,
        description="The commit of that model, whole.",
        examples=["0123456789abcdef0123456789abcdef01234567"],
    )
    filename: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="What the upload is called, if its metadata do not say so; or which of the files on the hub.",
        examples=["eve.safetensors"],
    )
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        default=None, description="Of the file; one that came as another is refused."
    )

    @model_validator(mode="after")
    def _that_belongs_together(self) -> Self:
        if (self.hub is None) != (self.revision is None):
            raise ValueError("a model of the hub is named by `hub` and `revision`, its commit")
        if self.hub is not None and self.sha256 is not None:
            raise ValueError("sha256 is of a file that you send; on the hub the commit says it all")
        if self.filename is not None and self.hub is None and self.upload is None:
            raise ValueError("filename is for an upload, or for a model of the hub")
        return self


class UploadState(BaseModel):
    """How far an upload is that comes in pieces."""

    id: str = Field(description="Names it.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    offset: int = Field(description="Bytes that are there.", examples=[0])
    length: int = Field(description="Bytes that it will have.", examples=[801_000])
    metadata: str = Field(description="What you said of it.", examples=["filename ZXZlLnNhZmV0ZW5zb3Jz"])
    expires_at: datetime = Field(description="When it is given up, if nothing more comes.")


class TrainingRequest(UploadRequest):
    """What to train, from which pictures; the fields of a form."""

    kind: Kind = Field(
        default="lora",
        description="`lora`: small, drawn beside others. `full`: every weight learns, where the operator lets it.",
    )
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS, description="Of training; as the base likes it.")
    rank: int | None = Field(default=None, ge=1, le=MOST_RANK, description="Of the LoRA; 16.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="The same seed trains the same model.")
    flip: bool = Field(default=False, description="Learn from mirror images, too.")
    resolution: int | None = Field(
        default=None, ge=256, le=1024, description="Pixels of the square that is learned; as the base was trained."
    )
    train_text_encoder: bool = Field(default=False, description="Let the words learn, too: closer, and slower.")
    prior_preservation: bool = Field(
        default=True,
        description="Learn from the base's own pictures of the class, too: it stays as it is.",
    )
    keep_pictures: bool = Field(default=False, description="Keep the pictures after the training.")
    webhook_url: Text | None = Field(default=None, max_length=2000, description="Where to tell of the end.")

    @field_validator("rank")
    @classmethod
    def _of_a_lora_alone(cls, rank: int | None, info: ValidationInfo) -> int | None:
        if rank is not None and info.data.get("kind") == "full":
            raise ValueError("a whole model has no rank: leave it out")
        return rank


class PictureVerdict(BaseModel):
    """What was found of one picture."""

    name: str = Field(description="Of its file.", examples=["1.jpg"])
    good: bool = Field(description="Whether it is trained on.", examples=[True])
    reason: str | None = Field(description="Why not.", examples=[None])


class TrainingState(BaseModel):
    """What is known of a training so far."""

    pictures: list[PictureVerdict] = Field(description="Every picture that came.")
    losses: list[tuple[int, float]] = Field(default_factory=list, description="[step, smoothed loss], for a curve.")
    version: int | None = Field(default=None, description="The version that it made.", examples=[1])
    scores: dict[str, float | None] | None = Field(default=None, description="How good its samples are.")
    refusal: str | None = Field(default=None, description="Why the version is not published, and what to do.")
