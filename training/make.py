"""`python -m training.make`: the bundled model and its sitters, from nothing.

Runs every stage in order, or those named; a stage whose result exists is skipped, and the UNet continues where it was
stopped. `--scale 0.001` runs everything, tiny, to see that it works."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training import autoencoder, evaluate, latents, reader, sheets, sitters, text, tokenizer, unet
from training.common import load, save
from training.pipeline import assemble
from training.redraw import Redraw


@dataclass(frozen=True)
class Steps:
    """Gradient steps and pictures of each stage, at full scale."""

    core: int = 2400
    text: int = 1500
    latents: int = 14_000
    unet: int = 7700
    decoder: int = 2000
    reader: int = 2000


@dataclass(frozen=True)
class Maker:
    models: Path
    work: Path
    docs: Path
    scale: float
    minutes: float  # at most, for each stage

    def steps(self, full: int) -> int:
        return max(2, round(full * self.scale))

    def done(self, name: str) -> bool:
        return (self.work / f"{name}.done").exists()

    def run(self, names: list[str]) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        for name in names:
            if self.done(name):
                print(f"{name}: done before", flush=True)
                continue
            STAGES[name](self)
            (self.work / f"{name}.done").touch()

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.work / "tokenizer")

    def core(self) -> AutoencoderKL:
        model = autoencoder.build(autoencoder.CORE_CHANNELS)
        model.load_state_dict(load(self.work / "core.pt")["model"])
        return model.eval()

    def denoiser(self) -> tuple[CLIPTextModel, UNet2DConditionModel]:
        state = load(self.work / "denoiser.pt")
        encoder, denoiser = text.build(self.tokenizer), unet.build()
        encoder.load_state_dict(state["text"])
        denoiser.load_state_dict(state["unet"])
        return encoder.eval(), denoiser.eval()


def _tokenizer(maker: Maker) -> None:
    tokenizer.build().save_pretrained(maker.work / "tokenizer")


def _core(maker: Maker) -> None:
    autoencoder.train_core(maker.steps(Steps.core), maker.minutes, maker.work)


def _text(maker: Maker) -> None:
    text.pretrain(maker.tokenizer, maker.steps(Steps.text), maker.minutes, maker.work)


def _latents(maker: Maker) -> None:
    latents.encode(maker.core(), maker.steps(Steps.latents), maker.work)


def _unet(maker: Maker) -> None:
    encoder = text.build(maker.tokenizer)
    encoder.load_state_dict(load(maker.work / "text.pt")["model"])
    trained = unet.train(encoder, maker.tokenizer, maker.steps(Steps.unet), maker.minutes, maker.work)
    save(maker.work / "denoiser.pt", unet=trained.unet, text=trained.text)


def _decoder(maker: Maker) -> None:
    encoder, denoiser = maker.denoiser()
    redraw = Redraw(denoiser, encoder, maker.tokenizer, unet.Denoising.standard(), Random(89))
    grown = autoencoder.grow(maker.core())
    autoencoder.sharpen(grown, redraw, maker.steps(Steps.decoder), maker.minutes, maker.work / "autoencoder.pt")


def _assemble(maker: Maker) -> None:
    vae = autoencoder.build((autoencoder.OUTER_CHANNELS, *autoencoder.CORE_CHANNELS))
    vae.load_state_dict(load(maker.work / "autoencoder.pt")["model"])
    encoder, denoiser = maker.denoiser()
    text.free_token(encoder, maker.tokenizer)
    assemble(vae, encoder, maker.tokenizer, denoiser, maker.models / "demo")


def _sitters(maker: Maker) -> None:
    for name in sitters.RECIPES:
        sitters.train(name, maker.models / "demo", maker.work, maker.models / "sitters" / name, maker.scale)


def _reader(maker: Maker) -> None:
    trained = reader.train(maker.core(), maker.steps(Steps.reader), maker.minutes, maker.work)
    reader.store(trained, maker.core(), maker.models / "reader", maker.steps(600))


def _evaluate(maker: Maker) -> None:
    for figure in evaluate.evaluate(maker.models, maker.scale, torch.get_num_threads()):
        print(f"{figure.name} {figure.value:.4g} {figure.unit}", flush=True)


def _sheets(maker: Maker) -> None:
    sheets.make_sheets(maker.models, maker.docs, steps=max(2, math.ceil(30 * min(1, maker.scale))))


STAGES: dict[str, Callable[[Maker], None]] = {
    "tokenizer": _tokenizer,
    "core": _core,
    "text": _text,
    "latents": _latents,
    "unet": _unet,
    "decoder": _decoder,
    "assemble": _assemble,
    "sitters": _sitters,
    "reader": _reader,
    "evaluate": _evaluate,
    "sheets": _sheets,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], default=[], help="default: all, in order")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="checkpoints and training pictures")
    parser.add_argument("--docs", type=Path, default=Path("docs/pictures"), help="contact sheets")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and pictures of every stage")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most, for each stage")
    parser.add_argument("--threads", type=int, default=0, help="default: as many as torch likes")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    maker = Maker(options.models, options.work, options.docs, options.scale, options.minutes)
    maker.run(options.stages or list(STAGES))


if __name__ == "__main__":
    main()
