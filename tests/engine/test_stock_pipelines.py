"""Every other text-to-image pipeline draws what its own call draws, through the whole service."""

import io
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image

from api.engine.components import Placement, load_stock
from api.engine.engine import Engine
from api.engine.pipeline import OnStep, Step, _stock_call
from api.engine.sources import find_base
from api.engine.weights import TensorPool
from api.errors import BadPicture, InvalidRequest, UnsupportedSize
from api.model_service import Generation, ModelService
from tests import builders, families

FamilyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def service(family_folder: FamilyFolder) -> Iterator[ModelService]:
    """Draws with a model of each family, for the user of its name."""
    users = {family: builders.source(family_folder(family)) for family in families.FAMILIES}
    opened = ModelService(builders.settings({"default": users["sdxl"], **users}, dtype="float32"))
    yield opened
    opened.close()


def draw(service: ModelService, family: str, on_step: OnStep = lambda step: None, **fields: Any) -> Generation:
    return service.generate(builders.request(user_id=family, **fields), on_step)


def pixels(generation: Generation) -> list[Any]:
    return [np.asarray(Image.open(io.BytesIO(png)), int) for png in generation.pngs]


def difference(some: list[Any], other: list[Any]) -> int:
    """The largest difference of any pixel."""
    return max(int(abs(one - two).max()) for one, two in zip(some, other, strict=True))


def bare(folder: Path, pictures: int = 1, scheduler: Any = None, **call: Any) -> list[Any]:
    """What the pipeline's own call draws of `builders.request`."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if scheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    getattr(pipeline, families.denoiser(pipeline)).requires_grad_(False)  # torch convolves otherwise, and rounds so
    given = {"num_inference_steps": 2, "width": 256, "height": 256, "num_images_per_prompt": pictures, **call}
    generators = [torch.Generator().manual_seed(7 + index) for index in range(pictures)]
    images = pipeline(prompt=builders.request().prompt, generator=generators, **given).images
    return [np.asarray(image, int) for image in images]


GUIDED: dict[str, Any] = {"guidance_scale": 5.0}
CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sdxl", {}, GUIDED),
    ("sdxl", {"negative_prompt": "a hat"}, {**GUIDED, "negative_prompt": "a hat"}),
    ("sdxl", {"width": 320}, {**GUIDED, "width": 320}),
    ("sd3", {}, GUIDED),
    ("sd3", {"negative_prompt": "a hat", "scheduler": "euler"}, {**GUIDED, "negative_prompt": "a hat"}),
    ("sd3", {"guidance_scale": 1.0, "height": 272}, {"guidance_scale": 1.0, "height": 272}),
    ("flux", {}, GUIDED),  # which is distilled into it
    ("flux", {"negative_prompt": "a hat"}, {"true_cfg_scale": 5.0, "negative_prompt": "a hat"}),
    ("flux", {"num_inference_steps": 3}, {**GUIDED, "num_inference_steps": 3}),
    ("pixart", {}, GUIDED),
    ("pixart", {"negative_prompt": "a hat"}, {**GUIDED, "negative_prompt": "a hat"}),
    ("qwen", {}, {"true_cfg_scale": 5.0, "negative_prompt": " "}),
    ("qwen", {"negative_prompt": "a hat"}, {"true_cfg_scale": 5.0, "negative_prompt": "a hat"}),
    ("lcm", {}, GUIDED),
]


@pytest.mark.parametrize(("family", "fields", "call"), CALLS, ids=str)
def test_the_picture_is_that_of_the_pipelines_own_call(
    service: ModelService, family_folder: FamilyFolder, family: str, fields: dict[str, Any], call: dict[str, Any]
) -> None:
    generation = draw(service, family, **{**GUIDED, **fields})
    [picture] = pixels(generation)
    assert (generation.lane, generation.warnings) == ("stock", [])
    assert difference([picture], bare(family_folder(family), **call)) == 0
    assert picture.std() > 10  # not a flat picture, which would equal any other
    if fields:
        assert picture.shape != (256, 256, 3) or difference([picture], pixels(draw(service, family, **GUIDED))) > 0


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_several_pictures_are_those_of_their_seeds(
    service: ModelService, family_folder: FamilyFolder, family: str
) -> None:
    two = pixels(draw(service, family, num_images=2, **GUIDED))
    assert difference(two, bare(family_folder(family), pictures=2, **GUIDED)) <= 1  # they are decoded one by one
    assert difference(two[1:], pixels(draw(service, family, seed=8, **GUIDED))) <= 1
    assert difference(two[:1], two[1:]) > 10


def test_a_sampler_of_its_kind_may_be_named(service: ModelService, family_folder: FamilyFolder) -> None:
    theirs = bare(family_folder("sdxl"), scheduler=UniPCMultistepScheduler, **GUIDED)
    assert difference(pixels(draw(service, "sdxl", scheduler="unipc", **GUIDED)), theirs) == 0
    assert difference(pixels(draw(service, "sdxl", **GUIDED)), theirs) > 0


@pytest.mark.parametrize(("family", "scheduler"), [("sd3", "ddim"), ("flux", "unipc"), ("lcm", "euler")])
def test_a_sampler_that_does_not_fit_is_refused_before_the_model_loads(
    family_folder: FamilyFolder, family: str, scheduler: str
) -> None:
    service = ModelService(builders.settings({"default": builders.source(family_folder(family))}))
    with pytest.raises(InvalidRequest, match=f"cannot draw with the scheduler {scheduler}") as caught:
        service.generate(builders.request(scheduler=scheduler))
    assert "Leave it out" in caught.value.hint
    assert service.cache.count() == 0
    service.close()


@pytest.mark.parametrize(("family", "width", "nearest"), [("sdxl", 261, 264), ("sd3", 264, 256), ("flux", 1000, 992)])
def test_a_wrong_size_is_told_before_the_model_loads(
    family_folder: FamilyFolder, family: str, width: int, nearest: int
) -> None:
    service = ModelService(builders.settings({"default": builders.source(family_folder(family))}))
    with pytest.raises(UnsupportedSize) as caught:
        service.generate(builders.request(width=width))
    assert str(nearest) in caught.value.hint
    assert service.cache.count() == 0
    service.close()


@pytest.mark.parametrize(
    ("family", "shows"), [("sdxl", True), ("sd3", True), ("pixart", True), ("flux", False), ("qwen", False)]
)
def test_steps_are_told_with_a_preview_where_latents_show_one(service: ModelService, family: str, shows: bool) -> None:
    seen: list[tuple[int, int, bool]] = []
    draw(service, family, lambda step: seen.append((step.done, step.of, step.preview() is not None)))
    assert seen == [(1, 2, shows), (2, 2, shows)]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_on_step_raises_ends_the_drawing_within_a_step(service: ModelService, family: str) -> None:
    before, steps = pixels(draw(service, family)), list[int]()

    def stop(step: Step) -> None:
        steps.append(step.done)
        if step.done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        draw(service, family, stop, num_inference_steps=50)
    assert steps == [1, 2]
    assert sum(info.users for info in service.cache.info()) == 0
    assert difference(pixels(draw(service, family)), before) == 0


def test_who_waits_for_the_lane_may_leave_it(
    service: ModelService, family_folder: FamilyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave() -> None:
        raise StoppedError

    monkeypatch.setattr("api.engine.pipeline.CHECK_SECONDS", 0.01)
    source = builders.source(family_folder("sdxl"))
    with service.lease(source) as model, _stock_call, pytest.raises(StoppedError):
        service.engine.draw(model, builders.request(), 7, lambda step: None, leave)


def test_drawings_that_come_together_are_those_drawn_alone(service: ModelService) -> None:
    jobs = [(family, seed) for family in ("sdxl", "flux", "sd3") for seed in (1, 2)]
    alone = [draw(service, family, seed=seed).pngs for family, seed in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda job: draw(service, job[0], seed=job[1]).pngs, jobs)
        assert list(together) == alone


def test_a_negative_prompt_that_a_model_does_not_take_is_told(service: ModelService) -> None:
    plain, asked = draw(service, "lcm"), draw(service, "lcm", negative_prompt="a hat")
    assert asked.pngs == plain.pngs
    [warning] = asked.warnings
    assert "no negative prompt" in warning


@pytest.mark.parametrize(("family", "read"), [("sdxl", 54), ("flux", 510), ("sd3", 254)])
def test_a_prompt_that_no_encoder_reads_whole_is_told(service: ModelService, family: str, read: int) -> None:
    # To the T5 of the tests a letter is a token and a space another, to CLIP they are one.
    fits = "a " * (read if family == "sdxl" else read // 2)
    assert draw(service, family, prompt=fits).unread == {}
    assert draw(service, family, prompt=fits + "b " * 300).unread["prompt"].endswith("b b b")


def test_t5_reads_without_any_network(family_folder: FamilyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for family in ("sd3", "flux"):
        service = ModelService(builders.settings({"default": builders.source(family_folder(family))}))
        assert service.generate(builders.request()).pngs != service.generate(builders.request(prompt="a cat")).pngs
        service.close()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize(
    ("part", "layer", "reason"),
    [("denoiser", "proj_out|conv_out", "latents are not finite"), ("vae", "decoder.conv_out", "pixels are not finite")],
)
def test_what_is_not_finite_is_no_picture(
    family_folder: FamilyFolder, family: str, part: str, layer: str, reason: str
) -> None:
    service = ModelService(builders.settings({"default": builders.source(family_folder(family))}, dtype="float32"))
    with service.lease(builders.source(family_folder(family))) as model:
        pipeline = model.base.pipeline
        module = getattr(pipeline, families.denoiser(pipeline) if part == "denoiser" else part)
        last = next(module.get_submodule(name) for name in layer.split("|") if hasattr(module, name.split(".")[0]))
        last.bias.data.fill_(float("nan"))
        with pytest.raises(BadPicture, match=reason):
            service.generate(builders.request())
    service.close()


def load(folder: Path, dtype: torch.dtype) -> Any:
    found = find_base(builders.source(folder), builders.settings())
    return load_stock(found, Placement("cpu", dtype, torch.float32), TensorPool())


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_pipeline_has_one_precision_but_where_its_models_need_more(
    family_folder: FamilyFolder, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, exact: torch.dtype
) -> None:
    set_to: list[torch.dtype] = []  # torch's default is also that of whoever draws meanwhile
    monkeypatch.setattr(torch, "set_default_dtype", set_to.append)
    pipeline = load(family_folder("flux"), dtype)
    assert set(set_to) <= {torch.float32}
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    named = [pair for part in parts for pair in part.named_parameters()]
    assert {parameter.dtype for name, parameter in named if ".wo." not in name} == {dtype}
    assert {parameter.dtype for name, parameter in named if ".wo." in name} == {exact}  # T5 overflows in float16
    assert not any(parameter.requires_grad for _, parameter in named)
    assert not any(part.training for part in parts)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_draws_in_bfloat16(family_folder: FamilyFolder, service: ModelService, family: str) -> None:
    half = ModelService(builders.settings({"default": builders.source(family_folder(family))}, dtype="bfloat16"))
    generation = half.generate(builders.request())
    half.close()
    assert pixels(generation)[0].std() > 10
    assert np.abs(pixels(generation)[0] - pixels(draw(service, family))[0]).mean() < 25


def test_a_decoder_that_is_put_into_float32_for_a_while_is_a_copy(family_folder: FamilyFolder) -> None:
    service = ModelService(builders.settings({"default": builders.source(family_folder("sdxl"))}, dtype="float16"))
    with service.lease(builders.source(family_folder("sdxl"))) as model:
        vae, used = model.base.pipeline.vae, service.cache.used()
        assert vae.config.force_upcast
        parameters = {name: parameter.data_ptr() for name, parameter in vae.named_parameters()}
        assert pixels(service.generate(builders.request()))[0].std() > 10
        assert {name: parameter.data_ptr() for name, parameter in vae.named_parameters()} == parameters
        assert (vae.dtype, service.cache.used()) == (torch.float16, used)
    service.close()


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "qwen"])
def test_the_bytes_expected_are_the_bytes_held(family_folder: FamilyFolder, family: str) -> None:
    engine = Engine(builders.settings(dtype="float32"))
    found = engine.find_base(builders.source(family_folder(family)))
    held = sum(size for _, size in engine.load_base(found).sizes.values())
    assert -1000 < held - engine.base_bytes(found)["cpu"] < 2000  # what two parts share, and tables that no file holds


def test_one_model_at_a_time_passes_the_host_in_float32(
    family_folder: FamilyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half = Engine(builders.settings(dtype="float32")), Engine(builders.settings(dtype="bfloat16"))
    found = whole.find_base(builders.source(family_folder("flux")))
    everything = whole.base_bytes(found)["cpu"]
    largest = half.base_bytes(found)["cpu"] - everything // 2
    assert 0 < largest < everything
    monkeypatch.setattr(Engine, "device", "cuda")
    assert half.base_bytes(found) == {"cpu": largest, "cuda": everything // 2}
