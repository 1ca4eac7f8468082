"""The lane draws exactly what the stock diffusers call draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from api.config import ROOT
from api.engine.adapters import load_adapter
from api.engine.pipeline import SCHEDULERS, Drawing, Step, draw, drawn_size
from api.errors import BadPicture, Blocked
from api.schemas import GenerateRequest
from tests import builders


@pytest.fixture
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


def ours(base: StableDiffusionPipeline, seed: int = 7, **fields: Any) -> list[Image.Image]:
    return draw(base, None, builders.request(**fields), seed, lambda step: None).images


def theirs(base: StableDiffusionPipeline, request: GenerateRequest, **arguments: Any) -> list[Image.Image]:
    """The bare call on a pipeline of its own."""
    scheduler = SCHEDULERS[request.scheduler] if request.scheduler else DDIMScheduler
    pipeline = StableDiffusionPipeline(
        **{**base.components, "scheduler": scheduler.from_config(base.scheduler.config)},
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        generator=[torch.Generator().manual_seed(7 + index) for index in range(request.num_images)],
        **arguments,
    ).images
    return images


def difference(some: list[Image.Image], other: list[Image.Image]) -> int:
    """The largest difference of any pixel."""
    assert len(some) == len(other)
    pairs = [(np.asarray(one, int), np.asarray(two, int)) for one, two in zip(some, other, strict=True)]
    return max(int(abs(one - two).max()) for one, two in pairs)


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_the_picture_is_that_of_the_stock_call(base: StableDiffusionPipeline, scheduler: str | None) -> None:
    request = builders.request(scheduler=scheduler, num_inference_steps=4)
    images = ours(base, scheduler=scheduler, num_inference_steps=4)
    assert difference(images, theirs(base, request)) == 0
    assert images[0].size == (256, 256)
    assert np.asarray(images[0]).std() > 10  # not a flat picture, which would equal any other


def test_every_scheduler_draws_otherwise(base: StableDiffusionPipeline) -> None:
    pictures = {name: ours(base, scheduler=name, num_inference_steps=4)[0].tobytes() for name in SCHEDULERS}
    assert len(set(pictures.values())) == len(SCHEDULERS)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_images": 3},
        {"width": 320, "height": 256},
        {"guidance_scale": 1.0},
        {"guidance_scale": 20.0},
        {"negative_prompt": "glasses"},
        {"prompt": "word " * 400},
    ],
    ids=str,
)
def test_every_field_does_what_it_does_in_the_stock_call(base: StableDiffusionPipeline, fields: dict[str, Any]) -> None:
    assert difference(ours(base, **fields), theirs(base, builders.request(**fields))) == 0


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "a cat"}, {"negative_prompt": "a cat"}, {"guidance_scale": 2.0}, {"num_inference_steps": 3}],
    ids=str,
)
def test_every_field_changes_the_picture(base: StableDiffusionPipeline, fields: dict[str, Any]) -> None:
    assert difference(ours(base, **fields), ours(base)) > 0


def test_several_pictures_are_those_of_their_seeds(base: StableDiffusionPipeline) -> None:
    three = ours(base, num_images=3)
    for index, image in enumerate(three):
        # A batch's matrix products round otherwise than one row's: one level of 255 at most.
        assert difference([image], ours(base, seed=7 + index)) <= 1
    assert difference(three[:1], three[1:2]) > 10


def test_the_same_seed_draws_the_same_picture_after_others(base: StableDiffusionPipeline) -> None:
    first = ours(base, scheduler="unipc")
    ours(base, seed=8, scheduler="euler_a", num_inference_steps=5)
    assert difference(ours(base, scheduler="unipc"), first) == 0


def test_a_scheduler_that_asks_for_rescaled_guidance_gets_it() -> None:
    scheduler = DDIMScheduler.from_config({**builders.SCHEDULER, "_guidance_rescale": 0.7})
    base = builders.pipeline(scheduler=scheduler)
    request = builders.request(guidance_scale=15.0)
    images = ours(base, guidance_scale=15.0)
    assert difference(images, theirs(base, request, guidance_rescale=0.7)) == 0
    assert difference(images, theirs(base, request)) > 0


def test_rescaled_guidance_survives_saving(tmp_path: Path) -> None:
    scheduler = DDIMScheduler.from_config({**builders.SCHEDULER, "_guidance_rescale": 0.7})
    builders.pipeline(scheduler=scheduler).save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config["_guidance_rescale"] == 0.7


def test_latents_that_are_not_finite_are_no_picture(base: StableDiffusionPipeline) -> None:
    base.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(BadPicture, match="latents are not finite"):
        ours(base)


def test_pixels_that_are_not_finite_are_no_picture(base: StableDiffusionPipeline) -> None:
    base.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(BadPicture, match="pixels are not finite"):
        ours(base)


def test_a_decoder_that_overflows_in_half_precision_decodes_in_full(base: StableDiffusionPipeline) -> None:
    # Beyond float16's 65504 inside, an ordinary picture at the end.
    base.vae.decoder.conv_in.weight.data.mul_(1e5)
    base.vae.decoder.conv_in.bias.data.mul_(1e5)
    expected = ours(base)
    base.vae.to(torch.float16)
    base.unet.to(torch.float16)
    base.text_encoder.to(torch.float16)
    images = ours(base)
    assert base.vae.dtype == torch.float16
    assert np.abs(np.asarray(images[0], int) - np.asarray(expected[0], int)).mean() < 3


@pytest.mark.parametrize(
    ("asked", "drawn"), [((256, 256), (64, 64)), ((512, 256), (128, 64)), ((256, 320), (64, 80)), ((64, 64), (64, 64))]
)
def test_a_model_of_one_size_draws_it_and_the_picture_is_scaled(
    base: StableDiffusionPipeline, asked: tuple[int, int], drawn: tuple[int, int]
) -> None:
    base.scheduler.register_to_config(_shorter_side=64)
    assert drawn_size(base, *asked) == drawn
    [picture] = ours(base, width=max(256, asked[0]), height=max(256, asked[1]))
    assert picture.size == (max(256, asked[0]), max(256, asked[1]))


def test_a_model_without_a_size_of_its_own_draws_what_is_asked(base: StableDiffusionPipeline) -> None:
    assert drawn_size(base, 1024, 256) == (1024, 256)


@pytest.mark.slow
def test_every_scheduler_draws_much_the_same_with_the_bundled_model() -> None:
    """A sampler that reads the configuration otherwise than it was meant draws a gray face, and no error."""
    bundled = StableDiffusionPipeline.from_pretrained(ROOT / "models/demo", dtype=torch.float32)
    bundled.set_progress_bar_config(disable=True)

    def picture(scheduler: str | None) -> Any:
        words = "a bald man in a white chef uniform, plain blue background"
        return np.asarray(ours(bundled, prompt=words, num_inference_steps=20, scheduler=scheduler)[0], float)

    own = picture(None)
    assert {name: np.abs(picture(name) - own).mean() < 20 for name in SCHEDULERS} == dict.fromkeys(SCHEDULERS, True)


def test_on_step_counts_from_one_to_the_last(base: StableDiffusionPipeline) -> None:
    seen: list[tuple[int, int]] = []
    draw(base, None, builders.request(num_inference_steps=5), 7, lambda step: seen.append((step.done, step.of)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


class StoppedError(Exception):
    pass


def test_what_on_step_raises_ends_the_drawing_and_leaves_the_base(
    base: StableDiffusionPipeline, tmp_path: Path
) -> None:
    factors = builders.factors(base.unet, builders.UNET_LAYERS)
    adapter = load_adapter(builders.diffusers_lora(tmp_path / "lora.safetensors", factors, {}), base, 1.0)
    before = ours(base)
    parameters = {name: id(parameter) for name, parameter in base.unet.named_parameters()}
    steps: list[int] = []

    def stop(step: Step) -> None:
        steps.append(step.done)
        if step.done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        draw(base, adapter, builders.request(num_inference_steps=50), 7, stop)
    assert steps == [1, 2]
    assert {name: id(parameter) for name, parameter in base.unet.named_parameters()} == parameters
    assert difference(ours(base), before) == 0


def test_the_adapter_draws_and_leaves(base: StableDiffusionPipeline, tmp_path: Path) -> None:
    factors = builders.factors(base.unet, builders.UNET_LAYERS)
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", factors, {})
    plain = ours(base)
    drawn = draw(base, load_adapter(file, base, 1.0), builders.request(), 7, lambda step: None).images
    assert difference(drawn, plain) > 10
    reference = builders.pipeline()
    reference.load_lora_weights(tmp_path, weight_name=file.name)
    assert difference(drawn, theirs(reference, builders.request())) <= 1  # W + BA rounds otherwise than Wx + B(Ax)
    assert difference(ours(base), plain) == 0


LONG = "word " * 400


@pytest.mark.parametrize(
    ("fields", "unread"),
    [
        ({"prompt": "a knight", "negative_prompt": "a hat"}, []),
        ({"prompt": LONG}, ["prompt"]),
        ({"negative_prompt": LONG}, ["negative_prompt"]),
        ({"prompt": LONG, "negative_prompt": LONG}, ["prompt", "negative_prompt"]),
        ({"negative_prompt": LONG, "guidance_scale": 1.0}, []),  # which no model reads then
    ],
    ids=str,
)
def test_a_prompt_longer_than_the_model_reads_is_told(
    base: StableDiffusionPipeline, fields: dict[str, Any], unread: list[str]
) -> None:
    drawing = draw(base, None, builders.request(**fields), 7, lambda step: None)
    assert list(drawing.unread) == unread


def test_what_was_not_read_changes_nothing_and_what_was_read_does(base: StableDiffusionPipeline) -> None:
    prompt = "Ünïcödé 画, " + "a knight in a castle, " * 30  # words of one token each
    drawing = draw(base, None, builders.request(prompt=prompt), 7, lambda step: None)
    end = drawing.unread["prompt"]
    assert 0 < len(end) < len(prompt)
    assert prompt.strip().endswith(end)
    read = prompt.strip().removesuffix(end)
    assert difference(ours(base, prompt=read), drawing.images) == 0
    assert difference(ours(base, prompt=read + "something else"), drawing.images) == 0
    assert difference(ours(base, prompt=read.rsplit(maxsplit=1)[0]), drawing.images) > 0


def test_a_prompt_of_just_the_length_is_read_whole(base: StableDiffusionPipeline) -> None:
    words = base.tokenizer.model_max_length - 2  # beside a token that begins and one that ends
    assert len(base.tokenizer("a " * words).input_ids) == words + 2
    for more, unread in ((0, {}), (1, {"prompt": "a"}), (2, {"prompt": "a a"})):
        request = builders.request(prompt="a " * (words + more))
        assert draw(base, None, request, 7, lambda step: None).unread == unread


def test_times_are_told(base: StableDiffusionPipeline) -> None:
    drawing = draw(base, None, builders.request(), 7, lambda step: None)
    assert isinstance(drawing, Drawing)
    assert drawing.denoise_seconds > 0
    assert drawing.decode_seconds > 0


def checker(threshold: float) -> StableDiffusionSafetyChecker:
    """The real class with random weights: its cosine distances lie between −1 and 1."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": 10},
        vision_config={**tiny, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    made = StableDiffusionSafetyChecker(config)
    made.concept_embeds_weights.data.fill_(threshold)
    made.special_care_embeds_weights.data.fill_(threshold)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(("threshold", "blocks"), [(-2.0, True), (2.0, False)])
def test_the_safety_checker_of_the_model_has_the_last_word(
    base: StableDiffusionPipeline, threshold: float, blocks: bool
) -> None:
    plain = ours(base, num_images=2)
    checked = StableDiffusionPipeline(
        **{
            **base.components,
            "safety_checker": checker(threshold),
            "feature_extractor": CLIPImageProcessorPil(size=32, crop_size=32),
        }
    )
    if blocks:
        with pytest.raises(Blocked, match="safety checker"):
            ours(checked, num_images=2)
    else:
        assert difference(ours(checked, num_images=2), plain) == 0


def test_steps_are_counted_as_the_scheduler_takes_them(base: StableDiffusionPipeline) -> None:
    base.register_modules(scheduler=PNDMScheduler.from_config(builders.SCHEDULER, skip_prk_steps=True))
    seen: list[tuple[int, int]] = []
    draw(base, None, builders.request(num_inference_steps=3), 7, lambda step: seen.append((step.done, step.of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)], "PNDM takes one step more"
