"""A fine-tuned checkpoint as a delta: what it keeps, what it refuses, and that it is drawn as the checkpoint is."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from api.engine import deltas
from api.engine.adapters import Adapter, load_adapter
from api.engine.deltas import Delta, extract, fingerprint, psnr, read_delta, write_delta
from api.engine.slots import NO_ADAPTER, Slots
from api.engine.slotted import NormTable
from api.engine.sources import FoundBase
from api.errors import ModelUnavailable
from tests import builders
from tests.builders import finetuned, parameters_of
from tests.engine.test_slots import inputs, solo, together

RANK = 2
SAID = Delta("models/base", "1" * 64, "0" * 64, RANK, (41.5, 38.25))


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture(scope="module")
def checkpoint() -> StableDiffusionPipeline:
    """Every layer changed by a product of rank RANK, and every bias and norm."""
    return finetuned(builders.pipeline(), RANK)


def adapter_of(file: Path, base: StableDiffusionPipeline, tuned: StableDiffusionPipeline, rank: int = RANK) -> Adapter:
    write_delta(file, extract(base, tuned, rank).tensors, SAID)
    return load_adapter(file, base, 1.0)


def test_a_change_of_low_rank_is_kept_whole(
    tmp_path: Path, base: StableDiffusionPipeline, checkpoint: StableDiffusionPipeline
) -> None:
    adapter = adapter_of(tmp_path / "delta.safetensors", base, checkpoint)
    assert adapter.of_checkpoint
    again = builders.with_merged(base, adapter)
    for component in ("unet", "text_encoder"):
        expected, got = (parameters_of(getattr(each, component)) for each in (checkpoint, again))
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-3, msg=name)


def test_rows_of_a_delta_are_drawn_as_its_checkpoint_draws(
    tmp_path: Path, base: StableDiffusionPipeline, checkpoint: StableDiffusionPipeline
) -> None:
    adapter = adapter_of(tmp_path / "delta.safetensors", base, checkpoint)
    rows = inputs(4)
    slots = Slots(base.unet, "unet", 2)
    mine = slots.acquire(adapter)
    drawn = together(slots, [mine, NO_ADAPTER, mine, NO_ADAPTER], rows)
    expected = {mine: solo(checkpoint, None, rows), NO_ADAPTER: solo(base, None, rows)}
    for row, slot in enumerate([mine, NO_ADAPTER, mine, NO_ADAPTER]):
        other = expected[NO_ADAPTER if slot else mine][row]
        torch.testing.assert_close(drawn[row], expected[slot][row], rtol=5e-3, atol=5e-3)
        assert (drawn[row] - other).abs().max() > 0.05
    slots.release(mine)
    slots.drop(adapter)
    again = slots.acquire(load_adapter(builders.diffusers_lora(tmp_path / "x.safetensors", FACTORS, {}), base, 1.0))
    torch.testing.assert_close(together(slots, [NO_ADAPTER, again], inputs(2))[0], solo(base, None, inputs(2))[0])
    assert not any(table.is_changed for table in slots._tables.values() if isinstance(table, NormTable))


FACTORS = builders.factors(builders.pipeline().unet, builders.UNET_LAYERS)


def test_deltas_of_two_checkpoints_do_not_mix(
    tmp_path: Path, base: StableDiffusionPipeline, checkpoint: StableDiffusionPipeline
) -> None:
    other = finetuned(builders.pipeline(), RANK, seed=8)
    one, two = (
        adapter_of(tmp_path / f"{number}.safetensors", base, tuned) for number, tuned in enumerate((checkpoint, other))
    )
    slots, rows = Slots(base.unet, "unet", 2), inputs(5)
    first, second = slots.acquire(one), slots.acquire(two)
    chosen = [second, first, NO_ADAPTER, second, first]
    drawn = together(slots, chosen, rows)
    alone = {first: solo(checkpoint, None, rows), second: solo(other, None, rows), NO_ADAPTER: solo(base, None, rows)}
    for row, slot in enumerate(chosen):
        torch.testing.assert_close(drawn[row], alone[slot][row], rtol=5e-3, atol=5e-3)
        assert all((drawn[row] - alone[wrong][row]).abs().max() > 0.05 for wrong in alone.keys() - {slot})
    slots.release(first)
    slots.drop(one)
    lora = load_adapter(builders.diffusers_lora(tmp_path / "lora.safetensors", FACTORS, {}), base, 1.0)
    third = slots.acquire(lora)
    assert third == first
    drawn = together(slots, [third, second, third, second, third], rows)
    alone = {third: solo(base, lora, rows), second: alone[second]}
    for row, slot in enumerate([third, second, third, second, third]):
        torch.testing.assert_close(drawn[row], alone[slot][row], rtol=5e-3, atol=5e-3)


def test_a_lower_rank_is_further_off(base: StableDiffusionPipeline, checkpoint: StableDiffusionPipeline) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    change = parameters_of(checkpoint.unet)[f"{name}.weight"] - parameters_of(base.unet)[f"{name}.weight"]

    def error(rank: int) -> float:
        made = extract(base, checkpoint, rank).tensors
        down, up = (made[f"unet.{name}.lora_{factor}.weight"].float() for factor in "AB")
        return float((up @ down - change).norm() / change.norm())

    assert error(RANK) < 0.01 < error(1)


def test_large_layers_are_cut_as_well_as_small_ones() -> None:
    torch.manual_seed(3)
    change = torch.randn(200, 4) @ torch.randn(4, 300)
    noisy = change + 0.01 * torch.randn(200, 300)
    down, up = deltas._factors(noisy, 4)
    best = torch.linalg.svdvals(noisy)[4:].square().sum().sqrt()
    assert (up @ down - noisy).norm() <= 1.01 * best


def test_what_no_lora_can_express_is_refused(base: StableDiffusionPipeline) -> None:
    words = builders.pipeline()
    words.text_encoder.get_input_embeddings().weight.data[5] += 1
    with pytest.raises(ModelUnavailable, match="which no LoRA can"):
        extract(base, words, RANK)
    decoder = builders.pipeline()
    decoder.vae.decoder.conv_in.weight.data += 1
    with pytest.raises(ModelUnavailable, match="different decoders"):
        extract(base, decoder, RANK)
    with pytest.raises(ModelUnavailable, match="the same"):
        extract(base, builders.pipeline(), RANK)


def test_a_file_says_what_the_gate_measured(tmp_path: Path) -> None:
    file = tmp_path / "delta.safetensors"
    write_delta(file, {"unet.x": torch.ones(1)}, SAID)
    assert read_delta(file) == SAID
    assert read_delta(file).passed
    assert not Delta("base", "", "", RANK, (41.5, deltas.LEAST_PSNR - 0.1)).passed
    assert not Delta("base", "", "", RANK, ()).passed
    lora = builders.diffusers_lora(tmp_path / "lora.safetensors", FACTORS, {})
    with pytest.raises(ModelUnavailable, match="not a delta"):
        read_delta(lora)


def test_a_fingerprint_tells_one_training_from_the_next(tmp_path: Path, base_folder: Path) -> None:
    copied = builders.copy_of(base_folder, tmp_path / "copied")
    assert fingerprint(FoundBase("one", base_folder)) == fingerprint(FoundBase("two", copied))
    finetuned(builders.pipeline(), 1).save_pretrained(copied)
    assert fingerprint(FoundBase("one", base_folder)) != fingerprint(FoundBase("two", copied))


def test_equal_pictures_have_100_decibels_and_others_fewer() -> None:
    grey, darker = (Image.new("RGB", (8, 8), (level,) * 3) for level in (128, 118))
    same, off = psnr([grey, darker], [grey, grey])
    assert same == 100
    assert off == pytest.approx(28.13, abs=0.01)
