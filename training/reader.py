"""The attribute reader: a small convolutional net that names what a picture shows. It judges generated pictures, so
it is trained on renders that look as bad as generated ones may: blurred, noisy, shifted, through the autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from api.engine.reader import Reader as Net
from training.common import Pace, autocast, descend, save, set_rate, to_tensor
from training.portrait import render
from training.text import labels
from training.world import ATTRIBUTES, Spec, held_out_spec, random_spec


class Reader(Net):
    """The reader of every attribute of the bundled world."""

    def __init__(self) -> None:
        super().__init__({key: len(values) for key, values in ATTRIBUTES.items()})

    @torch.no_grad()
    def read(self, pictures: Sequence[NDArray[np.uint8]]) -> list[dict[str, str]]:
        """Square (height, width, 3) pictures of 256 pixels or more to attribute values."""
        batch = torch.cat([F.interpolate(to_tensor([picture]), size=(256, 256), mode="area") for picture in pictures])
        best = {key: logits.argmax(1).tolist() for key, logits in self(batch).items()}
        return [{key: ATTRIBUTES[key][classes[i]] for key, classes in best.items()} for i in range(len(pictures))]


def open_reader(folder: Path) -> Reader:
    reader = Reader()
    reader.load_state_dict({key: value.float() for key, value in load_file(folder / "reader.safetensors").items()})
    return reader.eval()


def train(core: AutoencoderKL | None, steps: int, minutes: float, folder: Path) -> Reader:
    """Continues from `folder`/reader.pt. Without an autoencoder the pictures are renders only."""
    torch.manual_seed(4)
    rng, reader, path = Random(41), Reader(), folder / "reader.pt"
    if path.exists():
        reader.load_state_dict(torch.load(path, weights_only=True)["reader"])
        rng = Random(42)
    optimiser = torch.optim.AdamW([{"params": list(reader.parameters()), "base": 2e-3}], lr=2e-3, weight_decay=0.02)
    for step in (pace := Pace("reader", steps, minutes)):
        set_rate(optimiser, pace.rate())
        specs = [random_spec(rng) for _ in range(32)]
        batch = to_tensor([render(spec, 256) for spec in specs])
        if core is not None and step % 3 == 0:
            batch[:8] = _through(core, batch[:8], 0.25 * rng.random())
        logits = reader(_spoil(batch, rng))
        loss = torch.stack([F.cross_entropy(logits[key], labels(key, specs)) for key in ATTRIBUTES]).sum()
        descend(loss, optimiser)
        pace.note(50, loss=loss.item())
        if step % 200 == 0:
            save(path, reader=reader)
            print("reader:", accuracy(reader, 100), flush=True)
    save(path, reader=reader)
    return reader


@torch.no_grad()
def _through(core: AutoencoderKL, batch: Tensor, noise: float) -> Tensor:
    with autocast():
        latents = core.encode(batch).latent_dist.mean
        out: Tensor = core.decode(latents + noise * torch.randn_like(latents)).sample.float().clamp(-1, 1)
    return out


def _spoil(batch: Tensor, rng: Random) -> Tensor:
    """Blur, noise, colour shift and a move of a few pixels, each at random."""
    if rng.random() < 0.4:
        size = rng.choice((96, 128, 160, 200))
        batch = F.interpolate(F.interpolate(batch, size=(size, size), mode="area"), size=(256, 256), mode="bilinear")
    batch = batch * rng.uniform(0.88, 1.12) + 0.06 * torch.randn(len(batch), 3, 1, 1)
    if rng.random() < 0.5:
        batch = batch + 0.15 * rng.random() * torch.randn_like(batch)
    return torch.roll(batch, (rng.randint(-4, 4), rng.randint(-4, 4)), dims=(2, 3))


@torch.no_grad()
def accuracy(reader: Reader, count: int, core: AutoencoderKL | None = None, seed: int = 7) -> dict[str, float]:
    """Share read right by attribute, on renders of descriptions never trained on, where the attribute can be seen."""
    rng = Random(seed)
    specs: list[Spec] = [held_out_spec(rng) for _ in range(count)]
    right: dict[str, list[bool]] = {key: [] for key in ATTRIBUTES}
    for spec in specs:
        picture = render(spec, 256)
        if core is not None:
            drawn = (_through(core, to_tensor([picture]), 0.0)[0].permute(1, 2, 0) + 1) * 127.5
            picture = drawn.round().byte().numpy()
        seen = reader.read([picture])[0]
        for key in ATTRIBUTES:
            if spec.shows(key):
                right[key].append(seen[key] == spec.value(key))
    return {key: round(sum(hits) / max(1, len(hits)), 4) for key, hits in right.items()}


def store(reader: Reader, core: AutoencoderKL, folder: Path, count: int = 600) -> None:
    """fp16 weights, and the reader's own accuracy beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.half().contiguous() for key, value in reader.state_dict().items()}, folder / "reader.safetensors"
    )
    stored = open_reader(folder)
    report = {"count": count, "renders": accuracy(stored, count), "through_autoencoder": accuracy(stored, count, core)}
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
