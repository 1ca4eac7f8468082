"""The attribute reader: a small convolutional net that names what a picture of the bundled world shows.

It judges what sitters' models draw, where its base is the bundled one; `training/reader.py` makes it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from api.engine.judge import Least, Run, Shown
from api.errors import ModelUnavailable

WEIGHTS, CONFIG = "reader.safetensors", "config.json"
SIDE = 256  # pixels of what it is given
_VIEW = 96
_CHANNELS = (24, 48, 72, 96, 96)


class Reader(nn.Module):
    """(n, 3, 256, 256) in [-1, 1] to logits by attribute, from two views: the whole picture and the head.

    Args:
        heads: attribute → how many values it has.
    """

    def __init__(self, heads: Mapping[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in zip((3, *_CHANNELS), _CHANNELS, strict=False):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        side = _VIEW // 2 ** len(_CHANNELS)
        self.join = nn.Linear(2 * _CHANNELS[-1] * side * side, 160)
        self.heads = nn.ModuleDict({key: nn.Linear(160, count) for key, count in heads.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Returns logits (n, values) by attribute."""
        views = (pictures, pictures[:, :, 12:188, 40:216])
        features = [self.trunk(F.interpolate(view, size=(_VIEW, _VIEW), mode="area")).flatten(1) for view in views]
        joined = F.silu(self.join(torch.cat(features, dim=1)))
        return {key: head(joined) for key, head in self.heads.items()}


@dataclass(frozen=True)
class AttributeReader:
    """A reader with its attributes: those that stay with a person, and those that a prompt sets. A judge."""

    net: Reader
    identity: tuple[str, ...]
    scene: tuple[str, ...]

    least: ClassVar[Least] = Least(likeness=0.75, obedience=0.75, class_kept=0.6)

    def measure(self, shown: Shown, run: Run) -> tuple[float, float, float]:
        """Returns likeness, obedience and how far the class is kept, from 0 to 1.

        They are shares: of the sitter's features that the samples show, of the scenes' features that they show as the
        base does, and of the features that the class's pictures have still.
        """
        groups = (shown.photos, shown.samples, shown.of_base, shown.of_class)
        photos, samples, base, after = (run(partial(self.read, group)) for group in groups)
        usual = [Counter(photo[key] for photo in photos).most_common(1)[0][0] for key in self.identity]
        sitter = dict(zip(self.identity, usual, strict=True))
        likeness = _share([sample[key] == sitter[key] for sample in samples for key in self.identity])
        pairs = list(zip(samples, base, strict=True))
        obedience = _share([sample[key] == plain[key] for sample, plain in pairs for key in self.scene])
        kept = [one[key] == plain[key] for one, plain in zip(after, base, strict=False) for key in self.identity]
        return likeness, obedience, _share(kept)

    @torch.inference_mode()
    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, int]]:
        """Returns for each picture the value of each attribute, as its number."""
        batch = torch.stack([_tensor(picture) for picture in pictures])
        values = {key: logits.argmax(1).tolist() for key, logits in self.net(batch).items()}
        return [{key: of_all[index] for key, of_all in values.items()} for index in range(len(pictures))]


def load_reader(folder: Path) -> AttributeReader:
    """Returns the reader in `folder`. Raises ModelUnavailable when it is not there or not whole."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        tensors = {key: value.float() for key, value in load_file(folder / WEIGHTS).items()}
        heads = {
            key.split(".")[1]: len(value) for key, value in tensors.items() if key.endswith(".bias") and "heads" in key
        }
        net = Reader(heads)
        net.load_state_dict(tensors)
        return AttributeReader(net.eval().requires_grad_(False), tuple(config["identity"]), tuple(config["scene"]))
    except Exception as error:
        raise ModelUnavailable(f"the reader in {folder.name} cannot be loaded", "Check JUDGES.") from error


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / max(1, len(hits))


def _tensor(picture: Image.Image) -> Tensor:
    """Returns the picture's lower square, which a portrait fills, as (3, 256, 256) in [-1, 1]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, picture.height - side
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()[None] / 127.5 - 1
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="area")[0]
