"""A LoRA with kohya's keys changes a base as the file does that it was made of, here and in diffusers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from api.engine.adapters import LayerDelta, load_adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.deltas import psnr
from api.engine.kohya import to_kohya
from api.engine.pipeline import draw
from api.engine.trainer import Examples, Recipe, Trainer
from api.engine.weights import NOTE, save_whole
from api.errors import ModelUnavailable
from tests import builders
from tests.builders import CONV, LINEAR, OUT, TEXT_LAYERS, UNET_LAYERS, Factors, Tensors

RANK = 2  # of the builders' factors
LEAST_PSNR = 40.0  # decibels
ATOL, RTOL = 1e-5, 1e-4


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture(scope="module")
def unet(base: StableDiffusionPipeline) -> Factors:
    return builders.factors(base.unet, UNET_LAYERS)


@pytest.fixture(scope="module")
def text(base: StableDiffusionPipeline) -> Factors:
    return builders.factors(base.text_encoder, TEXT_LAYERS)


@pytest.fixture(scope="module")
def trained(base: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a sitter's training writes, of rank 4; its steps are large, so that it shows in a picture."""
    chance = torch.Generator().manual_seed(1)
    own = Examples(torch.randn(3, 4, 8, 8, generator=chance), ["photo of sks person"] * 3)
    recipe = Recipe(steps=20, rank=4, rate=0.3, own=2, prior=0, seed=3)
    trainer = Trainer(base, own, None, recipe)
    for _ in range(recipe.steps):
        trainer.step()
    file = tmp_path_factory.mktemp("trained") / "20.safetensors"
    save_whole(trainer.learned.tensors(), file, '{"token": "sks person"}')
    return file


def exported(file: Path, folder: Path) -> Path:
    """The file of kohya's keys, with nothing beside it."""
    made = folder / "kohya"
    made.mkdir(exist_ok=True)
    (made / file.name).write_bytes(to_kohya(file))
    return made / file.name


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def deltas(base: StableDiffusionPipeline, file: Path) -> dict[tuple[str, str], LayerDelta]:
    read = [delta for delta in load_adapter(file, base, 1.0).deltas if isinstance(delta, LayerDelta)]
    return {(delta.component, delta.layer): delta for delta in read}


def scales(base: StableDiffusionPipeline, file: Path) -> dict[str, float]:
    return {layer: delta.scale for (_, layer), delta in deltas(base, file).items()}


def check_same_deltas(base: StableDiffusionPipeline, file: Path, other: Path) -> None:
    some, others = deltas(base, file), deltas(base, other)
    assert some.keys() == others.keys() != set()
    for name, delta in some.items():
        assert torch.equal(delta.down, others[name].down), name
        assert torch.equal(delta.up, others[name].up), name
        assert (delta.down.dtype, delta.up.dtype) == (others[name].down.dtype, others[name].up.dtype)
        assert delta.scale == pytest.approx(others[name].scale, rel=1e-6), name


def test_what_was_trained_changes_a_base_as_before(
    base: StableDiffusionPipeline, trained: Path, tmp_path: Path
) -> None:
    made = exported(trained, tmp_path)
    check_same_deltas(base, trained, made)
    tensors = load_file(made)
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {torch.float16}
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {4.0}
    assert all(tensor.shape == () for key, tensor in tensors.items() if key.endswith(".alpha"))
    assert len(tensors) == 3 * len(deltas(base, trained))


CONFIG = {
    f"{component}.{name}": value
    for component, alpha, layers in (("unet", 6, UNET_LAYERS), ("text_encoder", 1, TEXT_LAYERS))
    for name, value in {"r": RANK, "lora_alpha": alpha, "target_modules": list(layers)}.items()
}
Writer = Callable[[Path, Factors, Factors], Path]


def beside_peft(file: Path, unet: Factors, text: Factors) -> Path:
    """As peft saves a bare UNet, with its settings beside it."""
    written = load_file(builders.diffusers_lora(file, unet, {}))
    save_file({key.replace("unet.", "base_model.model."): tensor for key, tensor in written.items()}, file)
    file.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": 5, "alpha_pattern": {"attn1.to_q": 9}}))
    return file


STYLES: dict[str, Writer] = {
    "diffusers": builders.diffusers_lora,
    "diffusers before peft": builders.old_diffusers_lora,
    "the oldest diffusers": lambda file, unet, text: builders.oldest_diffusers_lora(
        file, {name: unet[name] for name in (LINEAR, OUT)}
    ),
    "peft": beside_peft,
    "kohya": builders.kohya_lora,
    "kohya with alphas": partial(builders.kohya_lora, alpha=0.5),
    "alphas in the metadata": partial(builders.diffusers_lora, config=CONFIG),
    "alphas by layer and rank-stabilized": partial(
        builders.diffusers_lora,
        config=CONFIG | {"unet.alpha_pattern": {LINEAR: 7, CONV: 3}, "unet.use_rslora": True},
    ),
}


@pytest.mark.parametrize("write", STYLES.values(), ids=STYLES)
def test_every_style_keeps_its_factors_and_scales(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, text: Factors, write: Writer
) -> None:
    file = write(tmp_path / "lora.safetensors", unet, text)
    check_same_deltas(base, file, exported(file, tmp_path))


def test_an_alpha_that_is_not_the_rank_is_kept(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, text: Factors
) -> None:
    config = CONFIG | {"unet.alpha_pattern": {LINEAR: 7}}
    made = exported(builders.diffusers_lora(tmp_path / "lora.safetensors", unet, text, config), tmp_path)
    found = scales(base, made)
    assert [found[layer] for layer in (LINEAR, CONV, TEXT_LAYERS[0])] == [3.5, 3.0, 0.5]
    stored = load_file(made)
    assert float(stored[f"lora_unet_{LINEAR.replace('.', '_')}.alpha"]) == 7.0
    assert metadata_of(made)["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("write", [builders.diffusers_lora, builders.old_diffusers_lora])
def test_the_keys_are_kohyas(tmp_path: Path, unet: Factors, text: Factors, write: Writer) -> None:
    tensors = load(to_kohya(write(tmp_path / "lora.safetensors", unet, text)))
    down_blocks = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    layers = {
        f"{down_blocks}_attn1_to_q",
        f"{down_blocks}_attn2_to_out_0",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_down_blocks_1_resnets_0_conv1",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_1_self_attn_out_proj",
    }
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{layer}.{ending}" for layer in layers for ending in endings}
    conv = "lora_unet_down_blocks_1_resnets_0_conv1"
    assert tensors[f"{conv}.lora_down.weight"].shape == (RANK, 8, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (16, RANK, 1, 1)


def test_the_oldest_style_names_the_layer_that_it_means(tmp_path: Path, unet: Factors) -> None:
    file = builders.oldest_diffusers_lora(tmp_path / "lora.safetensors", {OUT: unet[OUT]})
    assert f"lora_unet_{OUT.replace('.', '_')}.lora_up.weight" in load(to_kohya(file))


def drawn_by_diffusers(file: Path | None, output: str) -> Any:
    pipeline = builders.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    if file is not None:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    request = builders.request()
    return pipeline(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
    ).images


@pytest.fixture(params=["trained", "text and convolutions", "alphas"])
def lora(request: pytest.FixtureRequest, trained: Path, tmp_path: Path, unet: Factors, text: Factors) -> Path:
    if request.param == "trained":
        return trained
    config = CONFIG if request.param == "alphas" else None
    return builders.diffusers_lora(tmp_path / "lora.safetensors", unet, text, config)


def test_diffusers_draws_with_it_as_with_the_file_it_was_made_of(lora: Path, tmp_path: Path) -> None:
    made = exported(lora, tmp_path)
    latents, expected, plain = (drawn_by_diffusers(file, "latent") for file in (made, lora, None))
    assert torch.allclose(latents, expected, RTOL, ATOL)
    assert not torch.allclose(plain, expected, RTOL, 100 * ATOL)
    [likeness] = psnr(drawn_by_diffusers(made, "pil"), drawn_by_diffusers(lora, "pil"))
    assert likeness >= LEAST_PSNR


def test_diffusers_draws_with_it_what_is_drawn_here(base: StableDiffusionPipeline, lora: Path, tmp_path: Path) -> None:
    batch = Batch(most_rows=8)
    try:
        drawing = draw(Base(base, slots=4), load_adapter(lora, base, 1.0), builders.request(), 7, batch, lambda _: None)
    finally:
        batch.close()
    [likeness] = psnr(drawn_by_diffusers(exported(lora, tmp_path), "pil"), drawing.images)
    [of_plain] = psnr(drawn_by_diffusers(None, "pil"), drawing.images)
    assert likeness >= LEAST_PSNR > of_plain


def test_one_file_gives_the_same_bytes_every_time(trained: Path) -> None:
    assert len({to_kohya(trained) for _ in range(8)}) == 1


def test_it_says_what_is_known_of_it(trained: Path, tmp_path: Path) -> None:
    assert metadata_of(exported(trained, tmp_path)) == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        NOTE: '{"token": "sks person"}',
    }


@pytest.mark.parametrize(("width", "is_2"), [(768, "False"), (1024, "True"), (320, None)])
def test_it_says_of_which_stable_diffusion_it_is(tmp_path: Path, width: int, is_2: str | None) -> None:
    to_k = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    file = tmp_path / "lora.safetensors"
    factors = {"A": torch.ones(1, width), "B": torch.ones(320, 1)}
    save_file({f"{to_k}.lora_{role}.weight": factor for role, factor in factors.items()}, file)
    assert metadata_of(exported(file, tmp_path)).get("ss_v2") == is_2


def test_layers_of_several_ranks_are_told(tmp_path: Path, base: StableDiffusionPipeline, unet: Factors) -> None:
    ranks = {**unet, **builders.factors(base.unet, (LINEAR,), rank=3)}
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", ranks, {})
    made = exported(file, tmp_path)
    check_same_deltas(base, file, made)
    assert metadata_of(made)["ss_network_dim"] == "Dynamic"


def test_the_tensors_begin_where_readers_may_map_them(trained: Path) -> None:
    content = to_kohya(trained)
    assert content[8:10] == b'{"'  # A1111 looks for this
    assert int.from_bytes(content[:8], "little") % 8 == 0


DOWN, UP, ALPHA = (f"unet.{LINEAR}.{ending}" for ending in ("lora_A.weight", "lora_B.weight", "alpha"))
CONV_UP = f"unet.{CONV}.lora_B.weight"
NORM = "unet.down_blocks.0.resnets.0.norm1"
Change = Callable[[Tensors], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "one factor": (lambda t: t.pop(UP), f"one of the two factors of {LINEAR}"),
    "an alpha alone": (lambda t: t.update({"unet.conv_in.alpha": torch.tensor(1.0)}), "factors of conv_in"),
    "ranks differ": (lambda t: t.update({UP: torch.ones(8, 3)}), rf"{LINEAR} is \(8, 3\) @ \(2, 8\)"),
    "rank 0": (lambda t: t.update({UP: torch.ones(8, 0), DOWN: torch.ones(0, 8)}), LINEAR),
    "a number for a factor": (lambda t: t.update({DOWN: torch.tensor(1.0)}), LINEAR),
    "a vector for a factor": (lambda t: t.update({DOWN: torch.ones(2)}), LINEAR),
    "B's rank behind": (lambda t: t.update({UP: torch.ones(8, 1, 2)}), LINEAR),
    "an empty factor": (lambda t: t.update({UP: torch.ones(0)}), LINEAR),
    "a 3×3 convolution for B": (lambda t: t.update({CONV_UP: torch.ones(16, 2, 3, 3)}), CONV),
    "another component": (lambda t: t.update({"vae.conv_in.lora_A.weight": torch.ones(1)}), "key vae.conv_in"),
    "SDXL's second text": (lambda t: t.update({"text_encoder_2.a.lora_A.weight": torch.ones(1)}), "key text_encoder_2"),
    "LoHa": (lambda t: t.update({f"unet.{LINEAR}.hada_w1_a": torch.ones(1)}), f"{LINEAR}.hada_w1_a"),
    "not a LoRA": (lambda t: t.update({"weight": torch.ones(1)}), "key weight"),
    "DoRA": (lambda t: t.update({f"unet.{LINEAR}.lora_magnitude_vector": torch.ones(8)}), "DoRA"),
    "a norm": (lambda t: t.update({f"{NORM}.diff": torch.ones(8)}), "norm1's weight"),
    "a bias": (lambda t: t.update({f"unet.{CONV}.diff_b": torch.ones(16)}), f"{CONV}'s bias"),
    "NaN": (lambda t: t[DOWN].__setitem__((0, 0), float("nan")), f"{LINEAR} has values that are not finite"),
    "infinity": (lambda t: t[UP].__setitem__((0, 0), float("-inf")), f"{LINEAR} has values that are not finite"),
    "alpha NaN": (lambda t: t.update({ALPHA: torch.tensor(float("nan"))}), f"{LINEAR} has the alpha nan"),
    "alpha 0": (lambda t: t.update({ALPHA: torch.tensor(0.0)}), f"{LINEAR} has the alpha 0"),
    "two alphas": (lambda t: t.update({ALPHA: torch.ones(2)}), "does not load"),
    "empty": (lambda t: t.clear(), "lora.safetensors holds no LoRA weights"),
}


@pytest.mark.parametrize(("change", "culprit"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_lora_of_two_factors_is_refused_by_what_is_wrong(
    tmp_path: Path, unet: Factors, change: Change, culprit: str
) -> None:
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", unet, {})
    to_kohya(file)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelUnavailable, match=culprit):
        to_kohya(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: b"", "not a safetensors file"),
        (lambda content: b"\x80\x04" + content, "not a safetensors file"),
        (lambda content: content.replace(b'"F32"', b'"F3X"'), "does not load"),
    ],
    ids=["half of it", "empty", "a pickle", "an unknown type"],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, unet: Factors, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", unet, {})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelUnavailable, match=message):
        to_kohya(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"lora\.safetensors cannot be read"):
        to_kohya(tmp_path / "lora.safetensors")


def test_bad_settings_are_refused(tmp_path: Path, unet: Factors) -> None:
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", unet, {}, {"unet.lora_alpha": "much"})
    with pytest.raises(ModelUnavailable, match="settings of the adapter"):
        to_kohya(file)
