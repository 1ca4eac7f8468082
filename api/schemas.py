"""Every shape on the wire and its bounds. `GenerateRequest` travels down to the engine unchanged."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from api.config import DEFAULT_USER, USER_ID, ModelSource, Scheduler, Settings, UserId
from api.errors import InvalidRequest

MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1

Lane = Literal["batch", "delta", "exact", "stock"]


def _printable(text: str) -> str:
    text = text.strip()
    if re.search(r"[^\t\n\r -\ud7ff\ue000-\U0010ffff]", text):
        raise ValueError("control characters and half surrogate pairs are not allowed")
    return text


def _says_something(text: str) -> str:
    if not (text := _printable(text)):
        raise ValueError("say what to draw: the prompt is empty")
    return text


ModelName = Annotated[str, Field(pattern=f"^{USER_ID}$")]
VersionNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]


class AdapterChoice(BaseModel):
    """One of several own models that draw together."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    model: ModelName = Field(description="Its name or id.", examples=["eve"])
    model_version: VersionNumber | None = Field(
        default=None, description="Which version; null is the one that is published.", examples=[None]
    )
    weight: float = Field(
        default=1.0, ge=-2.0, le=2.0, allow_inf_nan=False, description="How much it counts.", examples=[0.7]
    )


class GenerateRequest(BaseModel):
    """What to draw, for whom, and how."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    prompt: Annotated[str, AfterValidator(_says_something)] = Field(
        max_length=MAX_PROMPT_CHARACTERS,
        description="What to draw. `sks person` is the person the user's model was trained on.",
        examples=["photo of sks person as a futuristic astronaut"],
    )
    user_id: UserId = Field(
        default=DEFAULT_USER,
        description="Whose model draws. A user without a model gets the default one; `model_id` in the answer says so.",
        examples=["ada"],
    )
    num_inference_steps: int = Field(
        default=30, ge=1, le=150, description="Denoising steps: more is slower and finer.", examples=[30]
    )
    guidance_scale: float = Field(
        default=7.5,
        ge=1.0,
        le=20.0,
        allow_inf_nan=False,
        description="How strictly the picture follows the prompt; 1 switches guidance off.",
        examples=[7.5],
    )
    width: int = Field(
        default=512,
        ge=256,
        le=1024,
        description="Pixels. A multiple of what the model's autoencoder asks for.",
        examples=[512],
    )
    height: int = Field(default=512, ge=256, le=1024, description="Pixels, as for `width`.", examples=[512])
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="The same seed draws the same picture again; null takes a random one, told in the answer.",
        examples=[42],
    )
    negative_prompt: Annotated[str, AfterValidator(_printable)] | None = Field(
        default=None,
        max_length=MAX_PROMPT_CHARACTERS,
        description="What to keep out.",
        examples=["blurry, sunglasses"],
    )
    scheduler: Scheduler | None = Field(
        default=None, description="The sampler; null takes the model's own.", examples=["dpmpp_2m"]
    )
    num_images: int = Field(
        default=1,
        ge=1,
        le=4,
        description="Pictures to draw; the second uses seed + 1, and so on.",
        examples=[1],
    )
    preset: Literal["fast"] | None = Field(
        default=None,
        description="`fast`: in few steps, where the model's base has a LoRA for that; steps, guidance and sampler "
        "that are not said follow it. null draws as usual.",
        examples=[None],
    )
    model: ModelName | None = Field(
        default=None,
        description="Which of the user's own models draws, by name or id; null is the one published last, else the "
        "configured one, which `default` names, too.",
        examples=[None],
    )
    model_version: VersionNumber | None = Field(
        default=None, description="Which version of `model`; null is the one that is published.", examples=[None]
    )
    adapters: list[AdapterChoice] = Field(
        default_factory=list,
        max_length=4,
        description="Several own models over one base that draw together, each by its weight; in place of `model`.",
        examples=[[]],
    )
    reproducible: bool = Field(
        default=False,
        description="Draw it in no batch with others, whose number changes the last digits: slower, and the same "
        "request draws the same pictures to the last bit.",
        examples=[False],
    )

    @model_validator(mode="after")
    def _one_way_to_name_models(self) -> Self:
        if self.adapters and self.model is not None:
            raise ValueError("model and adapters: give one of the two")
        if self.model_version is not None and self.model in (None, DEFAULT_USER):
            raise ValueError("model_version: name its model, too")
        return self

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed is not None and self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError("seed: too large for that many pictures")
        return self


def resolved(request: GenerateRequest, source: ModelSource, settings: Settings) -> GenerateRequest:
    """Returns the request with what its preset says of steps, guidance and sampler, where it says nothing itself.

    Args:
        request: as it came.
        source: what draws it.
        settings: what each base draws fast with.

    Raises:
        InvalidRequest: its model has no such preset.
    """
    if request.preset is None:
        return request
    fast = settings.fast_for(source)
    if fast is None:
        raise InvalidRequest("this model has no preset fast", "Leave preset out; FAST_MODELS is where it is given.")
    follows = fast.model_dump(include={"num_inference_steps", "guidance_scale", "scheduler"})
    return request.model_copy(
        update={name: value for name, value in follows.items() if name not in request.model_fields_set}
    )


class Timings(BaseModel):
    """Seconds spent in each phase."""

    queue: float = Field(description="Waiting for the device.", examples=[0.0])
    load: float = Field(description="Loading the model; near 0 when it was cached.", examples=[0.4])
    denoise: float = Field(description="Text encoding and denoising steps.", examples=[1.1])
    decode: float = Field(description="From latents to pixels.", examples=[0.2])
    encode: float = Field(description="From pixels to PNG.", examples=[0.05])


class GeneratedImage(BaseModel):
    """One picture of an answer."""

    image_id: str = Field(description="Name of the picture.", examples=["019a9f3c2d1191b2c4e8d7f60a53"])
    image_base64: str = Field(description="The PNG, base64.", examples=["iVBORw0KGgo…"])
    image_path: str = Field(
        description="Where the server keeps it.", examples=["/srv/sitter/api/output/ada_20260107_143022_3f21d07e.png"]
    )
    seed: int = Field(description="The seed that draws this picture again.", examples=[42])


class GenerateResponse(BaseModel):
    """The picture, and how it was made."""

    success: bool = Field(examples=[True], description="True: a failure is an error answer instead.")
    message: str = Field(examples=["Image generated successfully"], description="For people.")
    image_base64: str = Field(description="The first picture as PNG, base64.", examples=["iVBORw0KGgo…"])
    image_path: str = Field(
        description="Where the server keeps the first picture.",
        examples=["/srv/sitter/api/output/ada_20260107_143022_3f21d07e.png"],
    )
    model_id: str = Field(description="The model that drew it.", examples=["models/sitters/ada"])
    generation_time: float = Field(
        description="Seconds from the request to the finished pictures, waiting and loading included.", examples=[1.45]
    )
    image_id: str = Field(description="Name of the first picture.", examples=["019a9f3c2d1191b2c4e8d7f60a53"])
    seed: int = Field(description="Seed of the first picture.", examples=[42])
    cache: Literal["hit", "miss"] = Field(
        description="Whether the model was in memory already, or on its way there.", examples=["hit"]
    )
    lane: Lane = Field(
        description="`batch`: the model's LoRA in a step beside those of other users; `delta`: likewise what stands "
        "for a whole checkpoint, close to it; `exact`: the checkpoint itself, or a LoRA with the step to itself; "
        "`stock`: diffusers' own call, for what none of them can draw.",
        examples=["batch"],
    )
    timings: Timings = Field(description="Seconds by phase.")
    job_id: str = Field(
        description="The job that drew it, for GET /jobs/{id}.", examples=["019a9f3c2d10b1946ac93f21d07e"]
    )
    images: list[GeneratedImage] = Field(description="Every picture, the first included.")
    warnings: list[str] = Field(
        description="For people: what of the request the model did not read or cannot do. Usually empty.", examples=[[]]
    )


class HealthResponse(BaseModel):
    """That the server is up, and what it holds."""

    status: Literal["healthy"] = Field(examples=["healthy"], description="Always `healthy` when it answers.")
    device: str = Field(description="Where pictures are drawn.", examples=["cpu"])
    models_loaded: int = Field(description="Models in memory.", examples=[1])
    dtype: str = Field(description="Precision of the weights.", examples=["float32"])
    version: str = Field(description="Version of the service.", examples=["0.1.0"])


class CachedModel(BaseModel):
    """One model in memory."""

    model_id: str = Field(description="Base or adapter.", examples=["models/demo"])
    bytes: int = Field(description="Memory it uses.", examples=[39_700_000])
    own_bytes: int = Field(description="The part that no other model shares.", examples=[39_700_000])
    in_use: int = Field(description="Pictures being drawn with it, or waiting to be.", examples=[0])
    hits: int = Field(description="Times it was found in memory.", examples=[12])


class CacheResponse(BaseModel):
    """The models in memory."""

    models: list[CachedModel] = Field(description="Most recently used first.")
    used_bytes: dict[str, int] = Field(description="Memory used, by device.", examples=[{"cpu": 39_700_000}])
    budget_bytes: dict[str, int] = Field(
        description="Memory models may use, by device.", examples=[{"cpu": 8_000_000_000}]
    )
    slot_bytes: int = Field(
        description="Memory of the slots that hold LoRAs ready to draw, beside `used_bytes`: BATCH_ROWS of them in "
        "each base, as large as the highest rank there asks for.",
        examples=[12_000_000],
    )


class CacheCleared(BaseModel):
    """What `DELETE /cache` freed."""

    success: bool = Field(examples=[True], description="True.")
    message: str = Field(examples=["Freed 39.7 MB"], description="For people.")
    freed_bytes: int = Field(description="Bytes freed now.", examples=[39_700_000])
    deferred_bytes: int = Field(description="Bytes still in use, freed when their last picture is done.", examples=[0])


class ErrorResponse(BaseModel):
    """Every error has this shape."""

    error: str = Field(description="Stable code, for programs.", examples=["model_unavailable"])
    detail: str = Field(description="What happened.", examples=["models/ada is not there"])
    hint: str = Field(description="What to do about it.", examples=["Check its entry in USER_MODELS."])
