"""A model of the hub, put into a folder: at one commit, files alone that a model may have, and so many bytes."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from api.config import Settings
from api.engine.sources import INDEX, LORA_FILES
from api.engine.unpacked import FILES
from api.errors import Forbidden, InvalidRequest, ModelUnavailable, NotFound

WHOLE = {f"{folder}/{file}".removeprefix("/") for folder, files in FILES.items() for file in files}
LORA = {*LORA_FILES, "adapter_config.json"}


class _Bounded(BufferedWriter):
    """A file of so many bytes at most."""

    def __init__(self, path: Path, most: int, check: Callable[[], None]) -> None:
        super().__init__(FileIO(path, "xb"))
        self._left = most
        self._check = check

    def write(self, data: Any) -> int:
        """Writes on. Raises InvalidRequest, and what `check` raises."""
        self._check()
        self._left -= len(data)
        if self._left < 0:
            raise _too_large()
        return super().write(data)


def fetch(
    name: str,
    revision: str,
    wanted: str | None,
    into: Path,
    most: int,
    settings: Settings,
    check: Callable[[], None],
) -> None:
    """Puts a model of the hub into the empty folder `into`, as somebody might have sent it. Blocks meanwhile.

    Args:
        name: of the repository, `owner/name`.
        revision: a whole commit.
        wanted: which of its files, where it has several LoRAs or checkpoints.
        into: gets a model's folder, or one file named as a LoRA.
        most: bytes that it may have.
        settings: the hub's token, and how long it may take to answer.
        check: called for each piece; whatever it raises ends the download.

    Raises:
        NotFound: the hub has no such repository, commit or file.
        Forbidden: the hub asks for a permission that the server does not have.
        InvalidRequest: it holds no model, several, or too many bytes.
        ModelUnavailable: the hub cannot be reached.
        OSError: the disk.
    """
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    with _told(name, revision):
        api = HfApi(token=token)
        info = api.model_info(name, revision=revision, timeout=settings.hub_timeout_seconds, files_metadata=True)
    if info.sha != revision:
        raise NotFound(f"{name} has no commit {revision}", "Pin a whole commit.")
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    chosen = choose(sizes, wanted)
    if sum(sizes[source] or 0 for source in chosen) > most:
        raise _too_large()
    # Of the bytes themselves: packed ones would have another size.
    headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
    for source, target in chosen.items():
        path = into / target
        path.parent.mkdir(exist_ok=True)
        with _told(name, revision), _Bounded(path, most, check) as file:
            url = hf_hub_url(name, source, revision=revision)
            http_get(url, file, headers=headers, expected_size=sizes[source])
        most -= path.stat().st_size


def choose(names: Collection[str], wanted: str | None = None) -> Mapping[str, str]:
    """Returns which files of a repository are a model, and what they are to be called.

    Raises:
        InvalidRequest: there is none, or there are several and `wanted` names none of them.
    """
    weights = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if wanted is not None:
        if wanted not in weights:
            raise InvalidRequest(f"the repository has no such file as {wanted}", _one_of(weights))
        return {wanted: LORA_FILES[0]}
    if INDEX in names:
        return {name: name for name in sorted(WHOLE & set(names))}
    if any(name in names for name in LORA_FILES):
        return {name: name for name in sorted(LORA & set(names))}
    if len(weights) != 1:
        raise InvalidRequest(f"the repository has {len(weights)} models in safetensors", _one_of(weights))
    return {weights[0]: LORA_FILES[0]}


def _one_of(weights: list[str]) -> str:
    if not weights:
        return "Only safetensors are taken, never a pickle (.bin, .ckpt)."
    return f"Name one as `filename`: {', '.join(weights[:5])}{'…' if len(weights) > 5 else ''}."


def _too_large() -> InvalidRequest:
    return InvalidRequest("the model of the hub is larger than what is taken", "Take a smaller one.")


@contextmanager
def _told(name: str, revision: str) -> Iterator[None]:
    """Tells what the hub says no with. Raises as `fetch` does."""
    try:
        yield
    except GatedRepoError as error:
        raise Forbidden(f"{name} asks for permission", "Accept its terms on the hub and set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{name} has no commit {revision}", "Pin a commit that exists.") from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise NotFound(f"the hub has no model {name}", "Check the name; for a private one set HF_TOKEN.") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise Forbidden(f"the hub refuses to hand out {name}", "Check HF_TOKEN.") from error
        hint = "Send it again later, or send the file itself."
        raise ModelUnavailable(f"{name} cannot be fetched: the hub does not answer as it should", hint) from error
