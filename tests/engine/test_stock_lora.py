"""A LoRA over any other pipeline draws what diffusers' own load of it draws, and leaves nothing behind."""

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from api.config import ModelSource
from api.errors import ModelUnavailable
from api.model_service import ModelService
from tests import builders, families

FamilyFolder = Callable[[str], Path]
Open = Callable[..., ModelService]
SCALE = 0.7


@pytest.fixture
def open_service() -> Iterator[Open]:
    opened = []

    def open_one(**users: ModelSource) -> ModelService:
        default = users.get("default", next(iter(users.values())).without_lora())
        opened.append(ModelService(builders.settings({**users, "default": default}, dtype="float32")))
        return opened[-1]

    yield open_one
    for service in opened:
        service.close()


def draw(service: ModelService, user: str, **fields: Any) -> Any:
    [png] = service.generate(builders.request(user_id=user, **fields)).pngs
    return np.asarray(Image.open(io.BytesIO(png)), int)


def difference(some: Any, other: Any) -> int:
    """The largest difference of any pixel."""
    return int(abs(some - other).max())


def theirs(folder: Path, lora: Path, **guidance: Any) -> Any:
    """What diffusers draws after its own load of the LoRA."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="theirs")
    pipeline.set_adapters("theirs", SCALE)
    pipeline.set_progress_bar_config(disable=True)
    getattr(pipeline, families.denoiser(pipeline)).requires_grad_(False)
    given = guidance or {"guidance_scale": 7.5}
    sizes = {"width": 256, "height": 256, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(7)
    return np.asarray(pipeline(builders.request().prompt, generator=generator, **sizes, **given).images[0], int)


QWEN_GUIDANCE = {"true_cfg_scale": 7.5, "negative_prompt": " "}


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize(
    ("family", "guidance", "text"),
    [("sdxl", {}, True), ("sd3", {}, True), ("flux", {}, True), ("qwen", QWEN_GUIDANCE, False)],
)
def test_the_users_picture_is_that_of_diffusers_own_load(
    family_folder: FamilyFolder,
    tmp_path: Path,
    open_service: Open,
    family: str,
    guidance: dict[str, Any],
    text: bool,
    alpha: float | None,
) -> None:
    folder = family_folder(family)
    file = families.lora(tmp_path / "ada.safetensors", folder, alpha=alpha, text=text)
    service = open_service(ada=builders.source(folder, lora=str(file), lora_scale=SCALE))
    base = draw(service, "default")
    mine = draw(service, "ada")
    assert difference(mine, base) > 2
    assert difference(mine, theirs(folder, file, **guidance)) <= 1  # alpha is multiplied in elsewhere
    assert difference(draw(service, "default"), base) == 0
    assert difference(draw(service, "ada"), mine) == 0


def test_kohya_files_are_read(family_folder: FamilyFolder, tmp_path: Path, open_service: Open) -> None:
    folder = family_folder("sdxl")
    unet = DiffusionPipeline.from_pretrained(folder, local_files_only=True).unet
    names = tuple(name for name, _ in unet.named_modules() if name.endswith(families.LAYERS))
    file = builders.kohya_lora(tmp_path / "ada.safetensors", builders.factors(unet, names), {}, alpha=4.0)
    service = open_service(ada=builders.source(folder, lora=str(file), lora_scale=SCALE))
    assert difference(draw(service, "ada"), draw(service, "default")) > 10
    assert difference(draw(service, "ada"), theirs(folder, file)) == 0


def test_files_of_peft_itself_are_read_with_the_alpha_beside_them(
    family_folder: FamilyFolder, tmp_path: Path, open_service: Open
) -> None:
    folder = family_folder("flux")
    file = families.lora(tmp_path / "ada.safetensors", folder, alpha=8.0, text=False)
    bare = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    peft = tmp_path / "peft"
    peft.mkdir()
    save_file({f"base_model.model.{key}": tensor for key, tensor in bare.items()}, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8.0}))
    service = open_service(ada=builders.source(folder, lora=str(peft), lora_scale=SCALE))
    assert difference(draw(service, "ada"), theirs(folder, file)) <= 1


def test_users_of_one_base_never_mix(family_folder: FamilyFolder, tmp_path: Path, open_service: Open) -> None:
    users = {}
    for seed, (family, name) in enumerate([("flux", "ada"), ("flux", "bo"), ("sdxl", "chi"), ("sdxl", "dana")]):
        folder = family_folder(family)
        file = families.lora(tmp_path / f"{name}.safetensors", folder, seed)
        users[name] = builders.source(folder, lora=str(file))
    alone = {name: draw(open_service(**{name: source}), name) for name, source in users.items()}
    service = open_service(**users)
    with ThreadPoolExecutor(8) as pool:  # the first of them load while others draw
        together = pool.map(lambda name: (name, draw(service, name)), list(users) * 3)
        assert [difference(picture, alone[name]) for name, picture in together] == [0] * 12
    assert len({picture.tobytes() for picture in alone.values()}) == 4
    service.cache.check()


def test_an_adapter_costs_its_factors_and_keeps_no_base_twice(
    family_folder: FamilyFolder, tmp_path: Path, open_service: Open
) -> None:
    folder = family_folder("flux")
    file = families.lora(tmp_path / "ada.safetensors", folder)
    source = builders.source(folder, lora=str(file))
    service = open_service(ada=source)
    picture = draw(service, "default")
    alone = service.cache.used()
    mine = draw(service, "ada")
    factors = sum(tensor.nbytes for tensor in load_file(file).values())
    assert service.cache.used() == alone + factors
    service.cache.drop(source.without_lora())
    [info] = service.cache.info()
    assert service.cache.used() == info.total_bytes > factors  # the weights that it shares with its base are still here
    assert difference(draw(service, "default"), picture) == 0
    assert 0 <= service.cache.used() - alone - factors < 1000  # a buffer, which the pool does not look for
    assert difference(draw(service, "ada"), mine) == 0
    service.cache.check()


def test_a_pipeline_that_takes_no_lora_says_so(family_folder: FamilyFolder, tmp_path: Path, open_service: Open) -> None:
    file = families.lora(tmp_path / "ada.safetensors", family_folder("flux"))
    service = open_service(ada=builders.source(family_folder("pixart"), lora=str(file)))
    with pytest.raises(ModelUnavailable, match="a PixArtSigmaPipeline takes no LoRA"):
        draw(service, "ada")
    assert sum(info.users for info in service.cache.info()) == 0
    assert draw(service, "default").std() > 10
