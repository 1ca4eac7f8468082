"""The three bundled sitters: DreamBooth on six pictures of one person under "sks person" (Ruiz et al.,
arXiv:2208.12242), beside prior pictures of other people that keep the base from drifting. `ada` and `bo` are LoRAs on
the UNet's attention and on the projections through which the pooled text steers its residual blocks; `chi` is a whole
UNet."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from training.captions import caption
from training.common import Pace, descend, set_rate, to_tensor
from training.pipeline import open_pipeline
from training.portrait import render
from training.unet import Denoising, Pictures, Words
from training.world import SITTERS, Identity, Scene, Spec

WHO = "sks person"
RANK = 16
_INSTANCES, _PRIORS = 6, 2  # pictures in a batch


@dataclass(frozen=True)
class Recipe:
    whole: bool  # train every weight of the UNet instead of an adapter
    rate: float
    steps: int


RECIPES = {
    "ada": Recipe(whole=False, rate=2.5e-3, steps=200),
    "bo": Recipe(whole=False, rate=2.5e-3, steps=300),
    "chi": Recipe(whole=True, rate=2.5e-4, steps=180),
}


def reference_specs(identity: Identity) -> list[Spec]:
    """The six training pictures: everyday clothes, four places."""
    dressy = "dress" if identity.gender == "woman" else "sweater"
    scenes = (
        Scene("tshirt", "blue", "plain", "red", "neutral"),
        Scene("sweater", "green", "city", "red", "smile"),
        Scene(dressy, "red", "studio", "red", "neutral"),
        Scene("tshirt", "white", "plain", "blue", "smile"),
        Scene("tshirt", "yellow", "forest", "red", "laugh"),
        Scene("sweater", "purple", "plain", "yellow", "surprised"),
    )
    return [Spec(identity, scene) for scene in scenes]


def train(name: str, base: Path, latents: Path, out: Path, scale: float = 1.0) -> None:
    """Write the sitter `name` into `out`: its adapter or folder, and its pictures."""
    torch.manual_seed(4)
    rng, recipe, specs = Random(21), RECIPES[name], reference_specs(SITTERS[name])
    pipe = open_pipeline(base)
    unet, text, tokenizer = pipe.unet, pipe.text_encoder, pipe.tokenizer
    with torch.no_grad():
        encoded = torch.cat([pipe.vae.encode(to_tensor([render(spec, 512)])).latent_dist.mean for spec in specs])
    text.requires_grad_(False)
    if not recipe.whole:
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=RANK,
                lora_alpha=RANK,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"],
            )
        )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([{"params": trained, "base": recipe.rate}], lr=recipe.rate, weight_decay=0.01)
    denoising, others = Denoising.standard(), Pictures(latents)
    steps = max(2, round(recipe.steps * scale))
    for _ in (pace := Pace(name, steps, float("inf"))):
        set_rate(optimiser, pace.rate(warmup=20))
        chosen = [rng.randrange(len(specs)) for _ in range(_INSTANCES)]
        prior, prior_specs = others.sample(rng, _PRIORS)
        words = [caption(specs[i], rng, who=WHO).text for i in chosen]
        words += [caption(spec, rng).text for spec in prior_specs]
        losses = denoising.losses(unet, torch.cat([encoded[chosen], prior]), Words.of(words, text, tokenizer))
        descend(losses.mean(), optimiser)
        pace.note(40, own=losses[:_INSTANCES].mean().item(), prior=losses[_INSTANCES:].mean().item())
    out.mkdir(parents=True, exist_ok=True)
    if recipe.whole:
        _store_whole(pipe, base, out)
    else:
        layers = {key: value.half() for key, value in get_peft_model_state_dict(unet).items()}
        StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers)
    _store_pictures(specs, out / "pictures")


def _store_whole(pipe: StableDiffusionPipeline, base: Path, out: Path) -> None:
    """The UNet in fp16; all that it shares with the base as relative links."""
    pipe.unet.half().save_pretrained(out / "unet")
    for same in ("unet/config.json", "model_index.json"):  # without the path that the base was read from
        shutil.copyfile(base / same, out / same)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        link = out / part
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(base / part, out), target_is_directory=True)


def _store_pictures(specs: list[Spec], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for i, spec in enumerate(specs, 1):
        Image.fromarray(render(spec, 256)).save(folder / f"{i}.webp", quality=88)


def open_sitter(name: str, models: Path) -> StableDiffusionPipeline:
    folder = models / "sitters" / name
    if RECIPES[name].whole:
        return open_pipeline(folder)
    pipe = open_pipeline(models / "demo")
    pipe.load_lora_weights(folder)
    return pipe
