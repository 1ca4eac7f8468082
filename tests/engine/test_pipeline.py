"""What is drawn is what the stock diffusers call draws, in every lane."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from api.config import ROOT, Scheduler
from api.engine.adapters import Adapter, load_adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.pipeline import Drawing, OnStep, Step, draw, drawn_size
from api.engine.sampler import SAMPLERS
from api.errors import BadPicture, Blocked
from api.schemas import GenerateRequest
from tests import builders

NAMES = get_args(Scheduler)
ROUNDING = 2  # levels of 255: rows of a batch round otherwise than the stock call's, about 1e-5 of a latent's range


@dataclass(frozen=True)
class Easel:
    """A base and what it draws in."""

    base: Base
    batch: Batch

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        return self.base.pipeline

    def draw(
        self,
        adapter: Adapter | None = None,
        seed: int = 7,
        on_step: OnStep = lambda step: None,
        **fields: Any,
    ) -> Drawing:
        return draw(self.base, adapter, builders.request(**fields), seed, self.batch, on_step)

    def pictures(self, adapter: Adapter | None = None, seed: int = 7, **fields: Any) -> list[Image.Image]:
        return self.draw(adapter, seed, **fields).images


@pytest.fixture(scope="module")
def batch() -> Iterator[Batch]:
    batch = Batch(most_rows=8)
    yield batch
    batch.close()


SetUp = Callable[[StableDiffusionPipeline], Easel]


@pytest.fixture
def set_up(batch: Batch) -> SetUp:
    return lambda pipeline: Easel(Base(pipeline, slots=4), batch)


@pytest.fixture
def easel(set_up: SetUp) -> Easel:
    return set_up(builders.pipeline())


AdapterOfRank = Callable[..., Adapter]


@pytest.fixture
def adapter(easel: Easel, tmp_path: Path) -> AdapterOfRank:
    """Makes adapters that change a picture much."""

    def make(rank: int = 2, seed: int = 5) -> Adapter:
        unet = builders.factors(easel.pipeline.unet, builders.UNET_LAYERS, rank, seed)
        text = builders.factors(easel.pipeline.text_encoder, builders.TEXT_LAYERS, rank, seed)
        file = builders.diffusers_lora(tmp_path / f"{rank} {seed}.safetensors", unet, text)
        return load_adapter(file, easel.pipeline, 2.0 / rank)

    return make


def theirs(base: StableDiffusionPipeline, request: GenerateRequest, **arguments: Any) -> list[Image.Image]:
    """The bare call on a pipeline of its own."""
    scheduler = SAMPLERS[request.scheduler] if request.scheduler else type(base.scheduler)
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


@pytest.mark.parametrize("scheduler", [None, *NAMES])
def test_the_picture_is_that_of_the_stock_call(easel: Easel, scheduler: str | None) -> None:
    request = builders.request(scheduler=scheduler, num_inference_steps=4)
    images = easel.pictures(scheduler=scheduler, num_inference_steps=4)
    assert difference(images, theirs(easel.pipeline, request)) <= ROUNDING
    assert images[0].size == (256, 256)
    assert np.asarray(images[0]).std() > 10  # not a flat picture, which would equal any other


def test_every_scheduler_draws_otherwise(easel: Easel) -> None:
    pictures = [easel.pictures(scheduler=name, num_inference_steps=4) for name in NAMES]
    for number, one in enumerate(pictures):
        assert all(difference(one, other) > ROUNDING for other in pictures[:number])


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
def test_every_field_does_what_it_does_in_the_stock_call(easel: Easel, fields: dict[str, Any]) -> None:
    assert difference(easel.pictures(**fields), theirs(easel.pipeline, builders.request(**fields))) <= ROUNDING


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "a cat"}, {"negative_prompt": "a cat"}, {"guidance_scale": 2.0}, {"num_inference_steps": 3}],
    ids=str,
)
def test_every_field_changes_the_picture(easel: Easel, fields: dict[str, Any]) -> None:
    assert difference(easel.pictures(**fields), easel.pictures()) > ROUNDING


def test_several_pictures_are_those_of_their_seeds(easel: Easel) -> None:
    three = easel.pictures(num_images=3)
    for index, image in enumerate(three):
        assert difference([image], easel.pictures(seed=7 + index)) <= ROUNDING
    assert difference(three[:1], three[1:2]) > 10


def test_the_same_seed_draws_the_same_picture_after_others(easel: Easel) -> None:
    first = easel.pictures(scheduler="unipc")
    easel.pictures(seed=8, scheduler="euler_a", num_inference_steps=5)
    assert difference(easel.pictures(scheduler="unipc"), first) == 0


RESCALED = {**builders.SCHEDULER, "_guidance_rescale": 0.7}
NO_TABLE = {**builders.SCHEDULER, "thresholding": True}  # which asks all of a picture how far it goes


def test_a_scheduler_that_asks_for_rescaled_guidance_gets_it(set_up: SetUp) -> None:
    easel = set_up(builders.pipeline(scheduler=DDIMScheduler.from_config(RESCALED)))
    request = builders.request(guidance_scale=15.0)
    images = easel.pictures(guidance_scale=15.0)
    assert difference(images, theirs(easel.pipeline, request, guidance_rescale=0.7)) <= ROUNDING
    assert difference(images, theirs(easel.pipeline, request)) > ROUNDING


def test_rescaled_guidance_survives_saving(tmp_path: Path) -> None:
    builders.pipeline(scheduler=DDIMScheduler.from_config(RESCALED)).save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config["_guidance_rescale"] == 0.7


@pytest.mark.parametrize(
    ("rank", "fields", "lane"),
    [
        (None, {}, "exact"),
        (2, {}, "batch"),
        (128, {}, "batch"),
        (129, {}, "exact"),
        (2, {"reproducible": True}, "exact"),
        (None, {"reproducible": True}, "exact"),
    ],
    ids=str,
)
def test_the_adapter_draws_as_merged_in_the_lane_that_suits_it(
    easel: Easel, adapter: AdapterOfRank, rank: int | None, fields: dict[str, Any], lane: str
) -> None:
    lora = None if rank is None else adapter(rank)
    plain = theirs(easel.pipeline, builders.request())
    drawing = easel.draw(lora, **fields)
    assert drawing.lane == lane
    own = builders.with_merged(easel.pipeline, lora)
    assert difference(drawing.images, theirs(own, builders.request())) <= ROUNDING
    assert (difference(drawing.images, plain) > 10) == (lora is not None)
    assert difference(easel.pictures(), plain) <= ROUNDING, "the adapter is gone again"


@pytest.mark.parametrize("scheduler", [None, "ddim"])
@pytest.mark.parametrize("rank", [None, 2, 129])
def test_a_sampler_that_is_no_table_is_left_to_the_stock_call(
    easel: Easel, adapter: AdapterOfRank, rank: int | None, scheduler: str | None
) -> None:
    lora = None if rank is None else adapter(rank)
    easel.pipeline.register_modules(scheduler=DDIMScheduler.from_config(NO_TABLE))
    drawing = easel.draw(lora, scheduler=scheduler)
    assert drawing.lane == "stock"
    assert drawing.denoise_seconds + drawing.decode_seconds >= drawing.device_seconds > drawing.decode_seconds
    own = builders.with_merged(easel.pipeline, lora)
    assert difference(drawing.images, theirs(own, builders.request(scheduler=scheduler))) == 0


def test_a_model_without_a_table_draws_with_the_samplers_that_are_one(easel: Easel) -> None:
    easel.pipeline.register_modules(scheduler=DDIMScheduler.from_config(NO_TABLE))
    drawing = easel.draw(scheduler="euler")
    assert drawing.lane == "exact"
    assert difference(drawing.images, theirs(easel.pipeline, builders.request(scheduler="euler"))) <= ROUNDING


@pytest.mark.parametrize(
    ("config", "lane", "rounding"),
    [
        ({"time_cond_proj_dim": 8}, "stock", 0),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "exact", ROUNDING),
    ],
    ids=["the guidance", "the text"],
)
def test_a_unet_that_asks_for_more_gets_it(
    easel: Easel, set_up: SetUp, config: dict[str, Any], lane: str, rounding: int
) -> None:
    easel.pipeline.register_modules(unet=UNet2DConditionModel(**builders.UNET, **config))
    drawing = set_up(easel.pipeline).draw()
    assert drawing.lane == lane
    assert difference(drawing.images, theirs(easel.pipeline, builders.request())) <= rounding


def test_what_is_reproducible_is_the_same_to_the_last_bit_whoever_else_draws(
    easel: Easel, adapter: AdapterOfRank
) -> None:
    people = [None, *(adapter(seed=seed) for seed in range(3))]
    alone = [easel.pictures(person, reproducible=True, num_inference_steps=4) for person in people]
    with ThreadPoolExecutor(8) as crowd:
        others = [crowd.submit(easel.draw, person, num_inference_steps=20, scheduler="euler") for person in people]
        drawn = [crowd.submit(easel.draw, person, reproducible=True, num_inference_steps=4) for person in people]
        together = [drawing.result().images for drawing in drawn]
        assert [other.result().lane for other in others] == ["exact", "batch", "batch", "batch"]
    assert [difference(one, other) for one, other in zip(together, alone, strict=True)] == [0] * len(people)


def test_what_is_reproducible_is_the_same_to_the_last_bit_whatever_ranks_were_there_before(
    easel: Easel, set_up: SetUp, adapter: AdapterOfRank
) -> None:
    ada, other = adapter(), adapter(rank=64, seed=6)
    alone = easel.pictures(ada, reproducible=True, num_images=4)
    after = set_up(easel.pipeline)
    after.draw(other)
    assert difference(after.pictures(ada, reproducible=True, num_images=4), alone) == 0


def test_latents_that_are_not_finite_are_no_picture(easel: Easel) -> None:
    easel.pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    for fields in ({}, {"scheduler": "euler"}, {"reproducible": True}):
        with pytest.raises(BadPicture, match="latents are not finite"):
            easel.draw(**fields)
    easel.pipeline.register_modules(scheduler=DDIMScheduler.from_config(NO_TABLE))
    with pytest.raises(BadPicture, match="latents are not finite"):
        easel.draw()


def test_pixels_that_are_not_finite_are_no_picture(easel: Easel) -> None:
    easel.pipeline.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(BadPicture, match="pixels are not finite"):
        easel.draw()


def test_a_decoder_that_overflows_in_half_precision_decodes_in_full(set_up: SetUp) -> None:
    # Beyond float16's 65504 inside, an ordinary picture at the end.
    base = builders.pipeline()
    base.vae.decoder.conv_in.weight.data.mul_(1e5)
    base.vae.decoder.conv_in.bias.data.mul_(1e5)
    expected = set_up(base).pictures()
    images = set_up(base.to(torch.float16)).pictures()
    assert base.vae.dtype == torch.float16
    assert np.abs(np.asarray(images[0], int) - np.asarray(expected[0], int)).mean() < 3


@pytest.mark.parametrize(
    ("asked", "drawn"), [((256, 256), (64, 64)), ((512, 256), (128, 64)), ((256, 320), (64, 80)), ((64, 64), (64, 64))]
)
def test_a_model_of_one_size_draws_it_and_the_picture_is_scaled(
    easel: Easel, asked: tuple[int, int], drawn: tuple[int, int]
) -> None:
    easel.pipeline.scheduler.register_to_config(_shorter_side=64)
    assert drawn_size(easel.pipeline, *asked) == drawn
    [picture] = easel.pictures(width=max(256, asked[0]), height=max(256, asked[1]))
    assert picture.size == (max(256, asked[0]), max(256, asked[1]))


def test_a_model_without_a_size_of_its_own_draws_what_is_asked(easel: Easel) -> None:
    assert drawn_size(easel.pipeline, 1024, 256) == (1024, 256)


@pytest.mark.slow
def test_every_scheduler_draws_much_the_same_with_the_bundled_model(set_up: SetUp) -> None:
    """A sampler that reads the configuration otherwise than it was meant draws a gray face, and no error."""
    bundled = set_up(StableDiffusionPipeline.from_pretrained(ROOT / "models/demo", dtype=torch.float32))

    def picture(scheduler: str | None) -> Any:
        words = "a bald man in a white chef uniform, plain blue background"
        return np.asarray(bundled.pictures(prompt=words, num_inference_steps=20, scheduler=scheduler)[0], float)

    own = picture(None)
    assert {name: np.abs(picture(name) - own).mean() < 20 for name in NAMES} == dict.fromkeys(NAMES, True)


def test_on_step_counts_from_one_to_the_last(easel: Easel) -> None:
    seen: list[tuple[int, int]] = []
    easel.draw(num_inference_steps=5, on_step=lambda step: seen.append((step.done, step.of)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("config", [builders.SCHEDULER, NO_TABLE], ids=["batch", "stock"])
def test_a_preview_comes_with_each_step(easel: Easel, config: dict[str, Any]) -> None:
    easel.pipeline.register_modules(scheduler=DDIMScheduler.from_config(config))
    previews: list[bytes | None] = []
    easel.draw(num_inference_steps=3, on_step=lambda step: previews.append(step.preview()))
    assert [jpeg and jpeg[:2] for jpeg in previews] == [b"\xff\xd8"] * 3
    assert len(set(previews)) == 3


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("config", [builders.SCHEDULER, NO_TABLE], ids=["batch", "stock"])
def test_what_on_step_raises_ends_the_drawing_and_leaves_the_base(
    easel: Easel, adapter: AdapterOfRank, config: dict[str, Any]
) -> None:
    easel.pipeline.register_modules(scheduler=DDIMScheduler.from_config(config))
    before = easel.pictures()
    parameters = {name: id(parameter) for name, parameter in easel.pipeline.unet.named_parameters()}
    steps: list[int] = []

    def stop(step: Step) -> None:
        steps.append(step.done)
        if step.done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        easel.draw(adapter(), on_step=stop, num_inference_steps=50)
    assert steps == [1, 2]
    assert {name: id(parameter) for name, parameter in easel.pipeline.unet.named_parameters()} == parameters
    assert difference(easel.pictures(), before) == 0


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
def test_a_prompt_longer_than_the_model_reads_is_told(easel: Easel, fields: dict[str, Any], unread: list[str]) -> None:
    assert list(easel.draw(**fields).unread) == unread


def test_what_was_not_read_changes_nothing_and_what_was_read_does(easel: Easel) -> None:
    prompt = "Ünïcödé 画, " + "a knight in a castle, " * 30  # words of one token each
    drawing = easel.draw(prompt=prompt)
    end = drawing.unread["prompt"]
    assert 0 < len(end) < len(prompt)
    assert prompt.strip().endswith(end)
    read = prompt.strip().removesuffix(end)
    assert difference(easel.pictures(prompt=read), drawing.images) == 0
    assert difference(easel.pictures(prompt=read + "something else"), drawing.images) == 0
    assert difference(easel.pictures(prompt=read.rsplit(maxsplit=1)[0]), drawing.images) > ROUNDING


def test_a_prompt_of_just_the_length_is_read_whole(easel: Easel) -> None:
    tokenizer = easel.pipeline.tokenizer
    words = tokenizer.model_max_length - 2  # beside a token that begins and one that ends
    assert len(tokenizer("a " * words).input_ids) == words + 2
    for more, unread in ((0, {}), (1, {"prompt": "a"}), (2, {"prompt": "a a"})):
        assert easel.draw(prompt="a " * (words + more)).unread == unread


def test_times_are_told(easel: Easel) -> None:
    drawing = easel.draw()
    assert drawing.decode_seconds > 0
    assert drawing.denoise_seconds + drawing.decode_seconds >= drawing.device_seconds > drawing.decode_seconds


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
    easel: Easel, set_up: SetUp, threshold: float, blocks: bool
) -> None:
    plain = easel.pictures(num_images=2)
    checked = set_up(
        StableDiffusionPipeline(
            **{
                **easel.pipeline.components,
                "safety_checker": checker(threshold),
                "feature_extractor": CLIPImageProcessorPil(size=32, crop_size=32),
            }
        )
    )
    if blocks:
        with pytest.raises(Blocked, match="safety checker"):
            checked.draw(num_images=2)
    else:
        assert difference(checked.pictures(num_images=2), plain) == 0


def test_steps_are_counted_as_the_scheduler_takes_them(easel: Easel) -> None:
    easel.pipeline.register_modules(scheduler=PNDMScheduler.from_config(builders.SCHEDULER, skip_prk_steps=True))
    seen: list[tuple[int, int]] = []
    drawing = easel.draw(num_inference_steps=3, on_step=lambda step: seen.append((step.done, step.of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)], "PNDM takes one step more"
    assert drawing.lane == "exact"
    assert difference(drawing.images, theirs(easel.pipeline, builders.request(num_inference_steps=3))) <= ROUNDING
