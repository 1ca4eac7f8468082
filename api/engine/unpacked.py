"""The folder of a diffusers model that somebody sent: it has known files alone, and is of its base's architecture."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from api.engine.skeleton import OTHER_BASE, PARTS, Skeleton, build, flat, read, read_shapes, refuse_not_finite, rehearse
from api.engine.sources import check_folder
from api.engine.text2image import read_index
from api.engine.weights import loading
from api.errors import ModelUnavailable

OTHER_PARTS = "A whole model has a unet, a vae, a text_encoder, a tokenizer and a scheduler, of the base's classes."
NOT_WHOLE = "Save it again with save_pretrained, and send nothing else."
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
# Folder → the files that may lie in it.
FILES = {
    "": {"model_index.json"},
    **{part: {"config.json", WEIGHTS[part]} for part in PARTS},
    "scheduler": {"scheduler_config.json"},
    "tokenizer": {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
    },
}
MAX_JSON_BYTES = 16 * 1024 * 1024
WANTS_CODE = {"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code"}
# What savers write into a configuration beside what the base's has.
NOTES = {"_class_name", "_diffusers_version", "_name_or_path"}
TEXT_NOTES = {"_name_or_path", "torch_dtype", "dropout"}
TIMESTEPS = "num_train_timesteps"


def list_files(folder: Path, known: Mapping[str, set[str]]) -> dict[str, Path]:
    """Returns the files of a model's folder by their names in it.

    Raises:
        ModelUnavailable: there is anything else than known files, or one of JSON asks for code or cannot be read.
    """
    files: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        if stat.S_ISDIR(entry.lstat().st_mode):
            if entry.name not in known:
                raise ModelUnavailable(f"the folder {entry.name} is no part of a model", OTHER_PARTS)
            files |= {f"{entry.name}/{file.name}": file for file in sorted(entry.iterdir())}
        else:
            files[entry.name] = entry
    for name, file in files.items():
        refuse_no_file(name, file)
        if file.name not in known[name[: -len(file.name)].removesuffix("/")]:
            raise ModelUnavailable(f"{name} is no part of a model", NOT_WHOLE)
        if file.suffix == ".json":
            _refuse_code(name, _read_json(name, file))
    return files


def refuse_no_file(name: str, path: Path) -> None:
    """Raises ModelUnavailable for a link, a pipe, a device or a folder."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ModelUnavailable(f"{name} is a link, or something else that is no file", "Send the file itself.")


def _read_json(name: str, file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ModelUnavailable(f"{name} is larger than {MAX_JSON_BYTES // 1024**2} MB", NOT_WHOLE)
    try:
        return dict(json.loads(file.read_bytes()).items())
    except (ValueError, AttributeError, RecursionError) as error:  # every such file is one object
        raise ModelUnavailable(f"{name} cannot be read", NOT_WHOLE) from error


def _refuse_code(name: str, content: dict[str, Any]) -> None:
    """Raises ModelUnavailable for a file that names code to run, at whatever depth."""
    rest: list[Any] = [content]
    while rest:
        match rest.pop():
            case dict() as entries:
                if wanted := WANTS_CODE & entries.keys():
                    raise ModelUnavailable(f"{name} wants code ({min(wanted)}), which is refused", NOT_WHOLE)
                rest += entries.values()
            case list() as entries:
                rest += entries


def examine_model(folder: Path, base: Skeleton) -> None:
    """Raises ModelUnavailable unless the diffusers folder, of known files, is a whole model of the base's architecture.

    Its own configuration is what it will be loaded by: it may name nothing that the base's does not, and must come to
    the same tensors.
    """
    with loading(folder.name, folder):
        check_folder(folder)
        index = read_index(folder)
        if index.pipeline != base.index.pipeline:
            raise ModelUnavailable(f"the model is a {index.pipeline}, the base a {base.index.pipeline}", OTHER_BASE)
        for name, kind in index.components.items():
            if name not in FILES or (name != "scheduler" and kind is not base.index.components.get(name)):
                raise ModelUnavailable(f"the model's {name} is a {getattr(kind, '__name__', None)}", OTHER_PARTS)
        built = dict[str, Any]()
        for part in PARTS:
            _refuse_unknown_settings(folder, part, base)
            own = built[part] = build(index.models[part], folder / part)
            base.compare(part, own.state_dict())
            with safe_open(folder / part / WEIGHTS[part], framework="pt") as opened:
                stored = read_shapes(opened)
                refuse_not_finite(opened, stored)
            if part == "text_encoder":
                stored = flat(stored)
            else:
                own._fix_state_dict_keys_on_load(stored)  # old files call the VAE's attention otherwise
            base.compare(part, stored)
        if (side := built["unet"].config.sample_size) != base.unet.config.sample_size:
            raise ModelUnavailable(f"the model's unet has a sample_size of {side}", OTHER_BASE)
        rehearse(**built, length=base.tokenizer.model_max_length)
        _compare_tokenizers(read(index, folder, "tokenizer"), base.tokenizer)
        settings = _read_json("scheduler_config.json", folder / "scheduler/scheduler_config.json")
        _compare_settings(settings, base.scheduler)  # first: a scheduler takes memory for each of its steps
        _compare_schedulers(read(index, folder, "scheduler"), base.scheduler)


def _refuse_unknown_settings(folder: Path, part: str, base: Skeleton) -> None:
    name, config = f"{part}/config.json", getattr(base, part).config
    known = config.to_dict().keys() | TEXT_NOTES if part == "text_encoder" else config.keys() | NOTES
    if unknown := _read_json(name, folder / name).keys() - known:
        raise ModelUnavailable(f"{name} has {min(unknown)}, which is not known", NOT_WHOLE)


def _compare_tokenizers(own: Any, other: Any) -> None:
    """Raises ModelUnavailable unless both read every text alike.

    One token that the text encoder does not know ends the use of a GPU for the whole process.
    """

    def reads(tokenizer: Any) -> tuple[Any, ...]:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        return model, len(tokenizer), tokenizer.model_max_length, tokenizer.all_special_ids, tokenizer.pad_token_id

    if reads(own) != reads(other):
        raise ModelUnavailable("the model's tokenizer is not the base's", OTHER_BASE)


def _compare_settings(settings: Mapping[str, Any], other: Any) -> None:
    """Raises ModelUnavailable where a scheduler's settings may not differ from the base's and do."""
    for name, value in settings.items():
        # Names with an underscore are this server's, as of the size that it draws at.
        held = name == TIMESTEPS or (name.startswith("_") and name not in NOTES)
        if held and value != other.config.get(name):
            raise ModelUnavailable(f"the model's scheduler has another {name} than the base's", OTHER_BASE)


def _compare_schedulers(own: Any, other: Any) -> None:
    """Raises ModelUnavailable unless a scheduler can stand for the base's."""
    if type(own) not in (type(other), *other.compatibles):
        raise ModelUnavailable(f"the model's scheduler is a {type(own).__name__}", OTHER_PARTS)
    _compare_settings({TIMESTEPS: own.config[TIMESTEPS]}, other)
