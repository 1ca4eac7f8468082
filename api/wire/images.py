"""Pictures on the wire."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.config import Scheduler
from api.wire.jobs import Tag

MOST_STARS = 5
MOST_TAGS = 32  # of a picture


class ImageParameters(BaseModel):
    """How a picture was drawn."""

    width: int = Field(description="Pixels.", examples=[512])
    height: int = Field(description="Pixels.", examples=[512])
    num_inference_steps: int | None = Field(description="Denoising steps.", examples=[30])
    guidance_scale: float | None = Field(description="How strictly it follows the prompt.", examples=[7.5])
    scheduler: Scheduler | None = Field(description="The sampler; null was the model's own.", examples=["dpmpp_2m"])
    preset: str | None = Field(description="The preset that it was drawn with.", examples=[None])
    seed: int = Field(description="The seed that draws it again.", examples=[42])


class ImageMetadata(BaseModel):
    """When, where and at what cost a picture was made."""

    generated_at: datetime = Field(description="When it was finished.")
    api_used: str = Field(description="Who drew it: `local` is this server.", examples=["local"])
    cost: float = Field(description="What it cost.", examples=[0.0])
    processing_time: float = Field(description="Seconds it took.", examples=[1.45])


class Image(BaseModel):
    """A finished picture."""

    id: str = Field(description="Names the picture.", examples=["019a9f3c2d10b1946ac93f21d07e"])
    request_id: str = Field(description="The job that drew it.", examples=["019a9f3c2a00c2f7d0a1b2c3d4e5"])
    position: int = Field(description="Its place among the pictures of that job; 0 is the first.", examples=[0])
    user_id: str = Field(description="Whose it is.", examples=["ada"])
    prompt: str | None = Field(
        description="What was drawn; null when it is sensitive and not yours.",
        examples=["photo of sks person as a futuristic astronaut"],
    )
    negative_prompt: str | None = Field(description="What was kept out; null as for `prompt`.", examples=["blurry"])
    sensitive: bool = Field(description="Whether the prompt is kept encrypted.", examples=[False])
    model_id: str = Field(description="The model that drew it.", examples=["models/sitters/ada"])
    parameters: ImageParameters = Field(description="How it was drawn.")
    category: str | None = Field(description="What kind of picture it is.", examples=["portrait"])
    tags: list[str] = Field(description="Words it is filed under.", examples=[["astronaut"]])
    rating: int = Field(description="Stars that it was given, 1 to 5; 0 is none.", examples=[4])
    blur: str | None = Field(
        description="A few pixels of it, to show until it is there: a `data:` address; null for old ones.",
        examples=["data:image/webp;base64,UklGRj4AAABXRUJQ…"],
    )
    url: str = Field(description="Where the PNG is.", examples=["/images/019a9f3c2d10b1946ac93f21d07e/file"])
    file_path: str = Field(
        description="Its file in the server's output folder.", examples=["ada_20260107_143022_93f21d07.png"]
    )
    bytes: int = Field(description="Size of the PNG.", examples=[401_223])
    sha256: str = Field(description="SHA-256 of the PNG.", examples=["9f86d081884c7d65…"])
    metadata: ImageMetadata = Field(description="When, where and at what cost it was made.")
    status: Literal["succeeded"] = Field(default="succeeded", description="Always so: failures have no picture.")


class ImageChange(BaseModel):
    """What is to be changed of a picture. What is left away, or null, stays."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rating: int | None = Field(default=None, ge=0, le=MOST_STARS, description="Stars; 0 takes them away.", examples=[4])
    tags: list[Tag] | None = Field(
        default=None,
        max_length=MOST_TAGS,
        description="All the words that it is filed under, its boards.",
        examples=[["astronaut", "for the wall"]],
    )


class ImagePage(BaseModel):
    """Pictures, newest first."""

    images: list[Image] = Field(description="At most `limit`.")
    before: str | None = Field(
        description="Pass it as `before` for the next page; null on the last.",
        examples=["019a9f3c2d10b1946ac93f21d07e"],
    )
