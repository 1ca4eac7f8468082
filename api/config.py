"""Settings: one frozen object, read from the environment, `.env` and a YAML file, in that order of weight.

`USER_MODELS` below says which model each user has; the same name in the environment (JSON), `.env` or YAML
adds to it. A value that does not fit, or a setting nobody knows, stops the start with a sentence about it.
"""

import os
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from api.errors import SettingsError
from api.model_source import ROOT, FastSource, ModelSource, Scheduler, Source, locate
from api.origins import NamedSource, explain, unknown

__all__ = [
    "DEFAULT_USER",
    "ROOT",
    "USER_ID",
    "USER_MODELS",
    "FastSource",
    "ModelSource",
    "Scheduler",
    "Settings",
    "UserId",
    "load_settings",
    "locate",
]

USER_MODELS: dict[str, Any] = {
    # "default" draws for everybody who has no model of their own.
    "default": "models/demo",
    # Two LoRA adapters over the bundled base, and one full fine-tuned checkpoint.
    "ada": {"base": "models/demo", "lora": "models/sitters/ada"},
    "bo": {"base": "models/demo", "lora": "models/sitters/bo"},
    "chi": "models/sitters/chi",
    # Also possible:
    # "user_123": "Zhurah/sd15-dreambooth-photoai@<40-digit commit>",        a hub id, pinned
    # "user_456": "path/to/another/model",                                   a diffusers folder
    # "user_789": "path/to/checkpoint.safetensors",                          a single file
    # "user_790": {"base": "models/demo", "lora": "lora.safetensors", "lora_scale": 0.9},
    # "user_791": {"base": "path/to/flux", "lora": "flux.safetensors"},      any text-to-image pipeline of diffusers
    # "user_792": {"base": "path/to/checkpoint", "delta": "data/deltas/user_792.safetensors"},  see `sitter delta`
}

DEFAULT_USER = "default"


def _model_folder(path: Path) -> Path:
    folder = locate(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a model: it has no config.json")
    return folder


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _reasonable_user(name: str) -> str:
    if not re.fullmatch(USER_ID, name):
        raise ValueError(
            "a user id has letters, digits and . _ @ - only, 64 at most, and begins with one of A-Z a-z 0-9 _"
        )
    return name


def _addresses(text: str) -> str:
    for one in filter(None, map(str.strip, text.split(","))):
        ip_network(one)  # its own words say what is wrong
    return text


USER_ID = "[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}"  # also part of file names
UserId = Annotated[str, AfterValidator(_reasonable_user), WithJsonSchema({"type": "string", "pattern": f"^{USER_ID}$"})]


class Settings(BaseSettings):
    """Everything that can be set. Each field is also an environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_file=ROOT / ".env", env_ignore_empty=True, hide_input_in_errors=True
    )

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    use_gpu: bool = Field(default=True, description="Use the GPU (CUDA or Apple MPS) if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the weights; `auto` is float16 on a GPU (bfloat16 for other models than Stable "
        "Diffusion, if it has that), and on a CPU bfloat16 where it has instructions for that, else float32.",
    )
    cpu_threads: int = Field(default=0, ge=0, le=1024, description="Threads for drawing on a CPU; 0 means one a core.")
    user_models: dict[UserId, Source] = Field(
        default_factory=dict,
        validate_default=True,
        description="Models by user, added to `USER_MODELS` in api/config.py (JSON in the environment).",
    )
    fast_models: dict[str, FastSource] = Field(
        default_factory=dict,
        description="What `preset: fast` draws with, by base (JSON: "
        '`{"models/demo": {"lora": "lcm.safetensors"}}`); a base that is not here has no such preset.',
    )
    judges: dict[str, str] = Field(
        default_factory=lambda: {"models/demo": "models/reader"},
        description="Folder of the attribute reader that judges what was trained over a base (JSON); without one, "
        "and without JUDGE_ENCODER, likeness is not measured.",
    )
    judge_encoder: Annotated[Path, AfterValidator(_model_folder)] | None = Field(
        default=None,
        description="Folder of a CLIP model (transformers, safetensors) that judges trainings over bases without one.",
    )
    face_detector: Annotated[Path, AfterValidator(_model_folder)] | None = Field(
        default=None,
        description="Folder of a detector of faces or people (transformers, safetensors) that refuses pictures of "
        "none and of several.",
    )
    training_share: float = Field(
        default=0.15,
        ge=0.01,
        le=0.9,
        description="Share of the device's time that trainings have while something is drawn; all of it otherwise.",
    )
    full_training: bool = Field(
        default=False,
        description="Let users train whole models (`kind=full`), too: for each weight that takes 16 bytes of memory "
        "and up to 28 of DATA_DIR's disk, and 2 to keep it.",
    )
    host_cache_gb: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Memory for models on the host, in GB; 0 means half of the free memory.",
    )
    gpu_cache_gb: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Memory for models on the GPU, in GB; 0 means 70 % of the free memory.",
    )
    database_url: SecretStr | None = Field(
        default=None, description="`postgresql://…` or `sqlite:///path`; none takes the SQLite file DATA_DIR/sitter.db."
    )
    data_dir: Annotated[Path, AfterValidator(locate)] = Field(
        default=ROOT / "data", description="Folder for the database file and the server's own secret."
    )
    auth: Literal["open", "required"] = Field(
        default="open",
        description="`open`: no sign-in, for one's own machine alone. `required`: every request needs a credential.",
    )
    trusted_proxies: Annotated[str, AfterValidator(_addresses)] = Field(
        default="127.0.0.1",
        description="Addresses or networks (`a, b/16`) of proxies whose X-Forwarded-For and -Proto are believed.",
    )
    workers: int = Field(
        default=8, ge=0, le=64, description="Jobs in hand at once in the server; 0 leaves them to `sitter worker`."
    )
    batch_rows: int = Field(
        default=16,
        ge=2,
        le=256,
        description="Rows of one step: a picture is two, or one without guidance. More users' models fit in a step, "
        "and each step takes longer.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the UNet of Stable Diffusion models, for GPUs (torch.compile; needs a C++ compiler). "
        "Each model takes minutes when it is loaded, and so does the first LoRA that changes other layers than "
        "attention; nothing is drawn meanwhile.",
    )
    lease_seconds: float = Field(
        default=30.0, ge=0.5, le=3600, description="A job whose worker is silent for so long runs again elsewhere."
    )
    warm_first_seconds: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        description="Jobs of models in memory may overtake the head of the queue while it has waited less than this.",
    )
    max_queued: int = Field(default=20_000, ge=1, description="Jobs in the whole queue; more get 503 `busy`.")
    limit_queued: int = Field(default=100, ge=0, description="Jobs one user may have waiting; 0 is no limit.")
    limit_running: int = Field(default=4, ge=0, description="Jobs of one user that may run at once; 0 is no limit.")
    limit_requests_per_minute: int = Field(
        default=300, ge=0, description="Requests one user may send in a minute; 0 is no limit."
    )
    limit_images_per_day: int = Field(
        default=0, ge=0, description="Pictures one user may have drawn in a day (UTC); 0 is no limit."
    )
    limit_steps_per_day: int = Field(
        default=0, ge=0, description="Denoising steps of one user's pictures in a day (UTC); 0 is no limit."
    )
    limit_trainings: int = Field(
        default=3, ge=0, description="Trainings of one user that may wait or run at once; 0 is no limit."
    )
    limit_models_gb: float = Field(
        default=10.0, ge=0, allow_inf_nan=False, description="Space for one user's own models, in GB; 0 is no limit."
    )
    sensitive_prompts: bool = Field(
        default=False, description="Treat every prompt as sensitive: encrypted at rest, in no file, log or search."
    )
    webhook_allow_private: bool = Field(
        default=False, description="Let webhooks go to private and loopback addresses too, in a network of one's own."
    )
    metrics_token: SecretStr | None = Field(
        default=None, description="A token that reads /metrics besides administrators, as `Authorization: Bearer …`."
    )
    secret_keys: list[SecretStr] = Field(
        default_factory=list,
        description="Keys (JSON list, newest first) that sign sessions and encrypt prompts; "
        "none takes the one in DATA_DIR, made at the first start.",
    )
    output_dir: Annotated[Path, AfterValidator(locate)] = Field(
        default=ROOT / "api" / "output", description="Folder for the pictures; a relative one starts at the checkout."
    )
    hf_token: SecretStr | None = Field(default=None, description="Token for private models on the Hugging Face hub.")
    hub_timeout_seconds: float = Field(
        default=2.0,
        gt=0,
        le=600,
        description="Longest wait for the hub to answer before a model counts as unreachable.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info", description="Least severe log line shown."
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _add_configured_models(cls, data: dict[str, Any]) -> dict[str, Any]:
        given = data.get("user_models", {})
        return {**data, "user_models": {**USER_MODELS, **given}} if isinstance(given, dict) else data

    @field_validator("user_models")
    @classmethod
    def _has_default(cls, models: dict[str, ModelSource]) -> dict[str, ModelSource]:
        if DEFAULT_USER not in models:
            raise ValueError(f'nobody is "{DEFAULT_USER}", who draws for users without a model of their own')
        return models

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Weighs the sources: arguments, environment, `.env`, then the YAML file named by SITTER_CONFIG."""
        return init_settings, *_named(env_settings, dotenv_settings)

    @property
    def database(self) -> str:
        """The database's URL; it may hold a password."""
        return self.database_url.get_secret_value() if self.database_url else f"sqlite:///{self.data_dir / 'sitter.db'}"

    @property
    def origins(self) -> dict[str, str]:
        """Name in the environment → where the setting was read, of those that do not have their default."""
        return dict(self._origins)

    def owners(self) -> dict[str, str]:
        """Returns model id → user, of the models that one user alone has, and whose base nobody else's LoRA is over."""
        users: dict[str, set[str]] = {}
        for user, source in self.user_models.items():
            for one in {source.model_id, source.base}:
                users.setdefault(one, set()).add(user)
        return {one: user for one, (user, *others) in users.items() if not others and user != DEFAULT_USER}

    def fast_for(self, source: ModelSource) -> FastSource | None:
        """Returns what the model of `source` draws fast with, if that is given."""
        return self.fast_models.get(source.base)

    def source_for(self, user_id: str) -> ModelSource:
        """Returns where the model of `user_id` comes from: their own, or the default's."""
        return self.user_models.get(user_id, self.user_models[DEFAULT_USER])


def _yaml_file() -> Path:
    named = os.environ.get("SITTER_CONFIG")
    if named and not Path(named).is_file():
        raise SettingsError(f"SITTER_CONFIG names {named}, which is not a file")
    return Path(named) if named else ROOT / "sitter.yaml"


def _named(env: PydanticBaseSettingsSource, dotenv: PydanticBaseSettingsSource) -> list[NamedSource]:
    file = _yaml_file()
    try:
        yaml = YamlConfigSettingsSource(Settings, yaml_file=file)
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingsError(f"{file.name} has more than settings in it: they look like `port: 8000`") from error
    return [NamedSource("the environment", env), NamedSource(".env", dotenv), NamedSource(file.name, yaml)]


def _read_again() -> list[NamedSource]:
    return _named(EnvSettingsSource(Settings), DotEnvSettingsSource(Settings))


def _origins(overrides: dict[str, Any]) -> dict[str, str]:
    """Returns where `load_settings` reads what."""
    found = {name.upper(): source.name for source in reversed(_read_again()) for name in source()}
    return found | {name.upper(): "the command" for name in overrides}


def load_settings(**overrides: Any) -> Settings:
    """Returns the settings in force.

    Raises:
        SettingsError: a value does not fit, a file names an unknown setting, or the environment has a
            `SITTER_…` variable that nobody knows.
    """
    ours = sorted(name for name in os.environ if name.startswith("SITTER_") and name != "SITTER_CONFIG")
    if ours:
        raise SettingsError(unknown(ours[0], "the environment", [name.upper() for name in Settings.model_fields]))
    try:
        settings = Settings(**overrides)
        settings._origins = _origins(overrides)
        return settings
    except ValidationError as error:
        reason = explain(error, _read_again(), Settings.model_fields, ModelSource.model_fields)
        raise SettingsError(reason) from error
    except SettingsError:
        raise
    except Exception as error:  # a file that is no YAML, a variable that is no JSON: each library has its own
        raise SettingsError(f"the settings cannot be read: {error}") from error
