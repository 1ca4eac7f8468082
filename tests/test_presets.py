"""`preset: fast`: few steps by a LoRA and a decoder of the base, on top of whichever model of a user."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, LCMScheduler
from PIL import Image

from api.config import FastSource, Settings
from api.engine.adapters import Adapter, load_adapter
from api.errors import InvalidRequest, ModelUnavailable
from api.model_service import ModelService
from api.schemas import GenerateRequest, resolved
from tests import builders

ROUNDING = 2  # levels of 255: how many rows a batch has changes the last digits of latents


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)), int)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A user's LoRA, a few-step LoRA and a tiny decoder."""
    folder = tmp_path_factory.mktemp("fast")
    pipeline = builders.pipeline()
    made = {}
    for seed, name in enumerate(("ada", "few")):
        factors = builders.factors(pipeline.unet, builders.UNET_LAYERS, rank=2 + seed, seed=seed)
        made[name] = builders.diffusers_lora(folder / f"{name}.safetensors", factors, {})
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    tiny.save_pretrained(folder / "tiny")
    return made | {"tiny": folder / "tiny"}


def make_settings(base: Path, files: dict[str, Path], **fast: Any) -> Settings:
    users = {"default": builders.source(base), "ada": builders.source(base, lora=str(files["ada"]))}
    given = {"lora": str(files["few"]), **fast}
    return builders.settings(users, fast_models={str(base): FastSource(**given)})


@pytest.fixture
def settings(base_folder: Path, files: dict[str, Path]) -> Settings:
    return make_settings(base_folder, files)


@pytest.fixture
def service(settings: Settings) -> Iterator[ModelService]:
    service = ModelService(settings)
    yield service
    service.close()


def fast(settings: Settings, user_id: str = "ada") -> GenerateRequest:
    """A request that says nothing of steps."""
    said = builders.request(user_id=user_id, preset="fast").model_dump(exclude_unset=True)
    del said["num_inference_steps"]
    return resolved(GenerateRequest(**said), settings.source_for(user_id), settings)


def test_a_preset_says_steps_guidance_and_sampler(settings: Settings) -> None:
    request = fast(settings)
    assert (request.num_inference_steps, request.guidance_scale, request.scheduler) == (4, 1.0, "lcm")


def test_what_the_request_says_itself_is_kept(settings: Settings) -> None:
    request = builders.request(user_id="ada", preset="fast", num_inference_steps=6, scheduler="ddim")
    request = resolved(request, settings.source_for("ada"), settings)
    assert (request.num_inference_steps, request.guidance_scale, request.scheduler) == (6, 1.0, "ddim")


def test_a_model_without_it_refuses(base_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="preset"):
        resolved(builders.request(preset="fast"), builders.source(base_folder), builders.settings())


def expected(base: Path, loras: list[Path]) -> Any:
    """What diffusers draws when the LoRAs are merged one after the other."""
    pipeline = builders.pipeline()
    adapters: list[Adapter] = [load_adapter(file, pipeline, 1.0) for file in loras]
    for adapter in adapters:
        pipeline = builders.with_merged(pipeline, adapter)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    request = builders.request()
    drawn = pipeline(
        request.prompt,
        num_inference_steps=4,
        guidance_scale=1.0,
        width=256,
        height=256,
        generator=torch.Generator().manual_seed(7),
    )
    return np.asarray(drawn.images[0], int)


def test_it_draws_with_both_loras(
    service: ModelService, settings: Settings, base_folder: Path, files: dict[str, Path]
) -> None:
    by_both = service.generate(fast(settings))
    assert by_both.lane == "batch"
    assert by_both.model_id == str(files["ada"])
    picture = pixels(by_both.pngs[0])
    assert abs(picture - expected(base_folder, [files["ada"], files["few"]])).max() <= ROUNDING
    for others in ([files["ada"]], [files["few"]]):
        assert abs(picture - expected(base_folder, others)).max() > 10 * ROUNDING
    everybody = pixels(service.generate(fast(settings, "default")).pngs[0])
    assert abs(everybody - expected(base_folder, [files["few"]])).max() <= ROUNDING


def test_pictures_without_it_are_as_ever(service: ModelService, settings: Settings) -> None:
    plain = builders.request(user_id="ada")
    before = service.generate(plain).pngs[0]
    service.generate(fast(settings))
    assert abs(pixels(service.generate(plain).pngs[0]) - pixels(before)).max() <= ROUNDING


def test_its_decoder_makes_the_pixels(base_folder: Path, files: dict[str, Path], service: ModelService) -> None:
    settings = make_settings(base_folder, files, decoder=str(files["tiny"]))
    other = ModelService(settings)
    try:
        request = fast(settings)
        assert other.generate(request).pngs != service.generate(request).pngs
        assert other.generate(request).cache_hit
        plain = builders.request(user_id="ada")
        usual = [pixels(one.generate(plain).pngs[0]) for one in (other, service)]
        assert abs(usual[0] - usual[1]).max() <= ROUNDING
    finally:
        other.close()


def test_a_decoder_of_another_kind_is_refused_and_the_rest_goes_on(base_folder: Path, files: dict[str, Path]) -> None:
    settings = make_settings(base_folder, files, decoder=str(base_folder / "vae"))
    service = ModelService(settings)
    try:
        with pytest.raises(ModelUnavailable, match="AutoencoderTiny"):
            service.generate(fast(settings))
        service.generate(builders.request(user_id="ada"))
    finally:
        service.close()


def test_a_preset_that_is_gone_when_the_job_runs_is_told(base_folder: Path, files: dict[str, Path]) -> None:
    service = ModelService(builders.settings({"default": builders.source(base_folder)}))
    try:
        with pytest.raises(ModelUnavailable, match="preset"):
            service.generate(builders.request(preset="fast"))
    finally:
        service.close()
