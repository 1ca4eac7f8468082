"""Jobs on the wire."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from api.schemas import ErrorResponse, GenerateRequest
from api.wire.models import TrainingState
from api.wire.text import Text

PLAIN = r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$"  # no control characters, no space around it
Tag = Annotated[str, Field(min_length=1, max_length=64, pattern=PLAIN)]
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class JobRequest(GenerateRequest):
    """What to draw, and how the job is to be handled."""

    sensitive: bool = Field(
        default=False,
        description="Keep the prompt encrypted at rest, and out of files, logs and the search.",
        examples=[False],
    )
    tags: list[Tag] = Field(default_factory=list, max_length=16, description="Words to file it under.", examples=[[]])
    category: Tag | None = Field(default=None, description="What kind of picture it is.", examples=["portrait"])
    webhook_url: Text | None = Field(
        default=None,
        max_length=2000,
        description="Where to tell of the end, by the Standard Webhooks rules.",
        examples=["https://example.com/hook"],
    )
    priority: int = Field(
        default=0, ge=-100, le=100, description="Larger goes first; above 0 is for administrators.", examples=[0]
    )
    deadline_seconds: float | None = Field(
        default=None,
        ge=1,
        le=30 * 86_400,
        allow_inf_nan=False,
        description="Give it up when it is not done so many seconds after it was asked for; null never does.",
        examples=[60],
    )

    def drawing(self) -> GenerateRequest:
        """Returns what is to be drawn alone."""
        said = self.model_fields_set & GenerateRequest.model_fields.keys()
        return GenerateRequest.model_validate(self.model_dump(include=said))


class JobImage(BaseModel):
    """A finished picture of a job."""

    id: str = Field(description="Name of the picture.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    url: str = Field(description="Where the PNG is.", examples=["/images/019a9f3c2d10b1946ac93f21d07e/file"])
    seed: int = Field(description="The seed that draws it again.", examples=[42])


class Job(BaseModel):
    """A generation or a training: queued, running or ended."""

    id: str = Field(description="Name of the job.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    user_id: str = Field(description="Whose model draws.", examples=["ada"])
    status: Status = Field(description="How far it is.", examples=["running"])
    prompt: str | None = Field(
        description="What is drawn or trained; null where it is sensitive and not yours.",
        examples=["photo of sks person as a futuristic astronaut"],
    )
    model_id: str = Field(description="The model that draws.", examples=["models/sitters/ada"])
    sensitive: bool = Field(description="Whether the prompt is kept encrypted.", examples=[False])
    num_images: int = Field(description="Pictures asked for.", examples=[1])
    kind: Literal["draw", "train"] = Field(description="Whether it draws, or trains a model.", examples=["draw"])
    training: TrainingState | None = Field(description="What is known of a training; null of a drawing.")
    phase: str | None = Field(
        description="While it runs: `loading` or `drawing`; of a training `checking`, `caching`, `training`, "
        "`validating`, `publishing` or `warming`.",
        examples=["drawing"],
    )
    step: int = Field(description="Steps done.", examples=[12])
    steps: int = Field(description="Steps in all; 0 until they begin.", examples=[30])
    position: int | None = Field(description="While it waits: 1 is next; null from the 500th on.", examples=[None])
    eta_seconds: float | None = Field(
        description="Seconds until it is done, by what recent jobs took; null when unknown.", examples=[2.1]
    )
    cancel_requested: bool = Field(description="Whether it was asked to stop.", examples=[False])
    attempt: int = Field(description="Times it was begun.", examples=[1])
    images: list[JobImage] = Field(description="Its pictures, once it succeeded.")
    error: ErrorResponse | None = Field(description="Why it failed, or what it waits for.")
    warnings: list[str] = Field(description="What was not as asked.", examples=[[]])
    deadline: datetime | None = Field(description="When it is given up unless it is done; null for never.")
    created_at: datetime = Field(description="When it was accepted.")
    started_at: datetime | None = Field(description="When it was last begun.")
    finished_at: datetime | None = Field(description="When it ended.")


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[Job] = Field(description="At most `limit`.")
    before: str | None = Field(
        description="Pass it as `before` for the next page; null on the last.",
        examples=["019a9f3c2d10b1946ac93f21d07e"],
    )
