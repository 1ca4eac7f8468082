"""What a training's UNet hears of words is what a drawing's hears, to the last bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from api.engine.weights import shell
from api.engine.words import Words
from tests import builders, families

SIZE = (64, 48)  # height and width
FAMILIES: list[Callable[[], Any]] = [builders.pipeline, families.sdxl]
ENCODERS = ("text_encoder", "text_encoder_2")


def heard_in_a_drawing(pipeline: DiffusionPipeline, words: str) -> dict[str, torch.Tensor]:
    """What the UNet is given besides latents and times, rows without words first."""
    heard = dict[str, torch.Tensor]()

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        heard.update({"texts": given["encoder_hidden_states"]} | (given.get("added_cond_kwargs") or {}))

    hook = pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(words, height=SIZE[0], width=SIZE[1], num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    hook.remove()
    return heard


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_words_and_none_are_heard_as_in_a_drawing(family: Callable[[], Any], learns: bool) -> None:
    pipeline = family()
    present = [name for name in ENCODERS if hasattr(pipeline, name)]
    expected = heard_in_a_drawing(pipeline, "photo of sks person")
    one = Words(pipeline, {name: shell(getattr(pipeline, name)) for name in present} if learns else {})
    for row, heard in enumerate([one.silence(1, SIZE), one.read(["photo of sks person"], SIZE)]):
        named = {"texts": heard.texts, **(heard.added or {})}
        assert named.keys() == expected.keys()
        assert all(torch.allclose(named[name][0], expected[name][row], atol=1e-6) for name in named)


def test_each_row_has_its_own_words() -> None:
    pipeline = families.sdxl()
    one = Words(pipeline, {})
    both, alone = one.read(["a person", "a king"], SIZE), one.read(["a king"], SIZE)
    assert torch.equal(both.texts[1:], alone.texts)
    assert both.added is not None
    assert alone.added is not None
    assert torch.equal(both.added["text_embeds"][1:], alone.added["text_embeds"])
    assert both.added["time_ids"].tolist() == [[64.0, 48.0, 0.0, 0.0, 64.0, 48.0]] * 2
    assert one.silence(2, SIZE).texts.shape == both.texts.shape
