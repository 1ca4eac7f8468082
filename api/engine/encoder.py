"""The judge of bases that no attribute reader was made for: a CLIP model that the operator configured (JUDGE_ENCODER).

CLIP puts pictures and words into one space, where what shows or says the same lies close together (arXiv:2103.00020).
How close that is differs from model to model and from sitter to sitter. So every score is told from two marks that are
measured along with it: 0 is what the base draws of anybody, 1 is as good as it gets.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from api.engine.components import NO_CODE, ONE_LOAD, load_model
from api.engine.judge import Least, Run, Shown
from api.engine.weights import loading
from api.errors import ModelUnavailable

LEAST_GAP = 0.02  # of cosines, between both marks of a score; where they are closer nobody can tell
HINT = "Check JUDGE_ENCODER."
TOKENIZERS = ("tokenizer.json", "vocab.json")  # files that one is read from


@dataclass(frozen=True)
class Embedded:
    """What `Shown` holds, as embeddings of length one: (pictures or prompts, features) each."""

    photos: Tensor
    samples: Tensor
    of_base: Tensor
    of_class: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class ImageEncoder:
    """A CLIP model, and what prepares pictures and words for it."""

    model: Any
    processor: Any
    tokenizer: Any

    # Likeness: half of what DreamBooth reaches on its own examples, which is about 0.5 (a cosine of 0.80 where photos
    # have 0.89 among each other, arXiv:2208.12242, table 1; that anybody has about 0.7 is a guess). The other two: half
    # of what the base does itself.
    least: ClassVar[Least] = Least(likeness=0.25, obedience=0.5, class_kept=0.5)

    def measure(self, shown: Shown, run: Run) -> tuple[float | None, float | None, float | None]:
        """Returns likeness, obedience and how far the class is kept, each from 0 to 1 or None; see `measures`."""
        groups = (shown.photos, shown.samples, shown.of_base, shown.of_class)
        photos, samples, of_base, of_class = (
            torch.cat([run(partial(self.of_picture, one)) for one in group]) for group in groups
        )
        prompts = run(partial(self.of_words, shown.prompts))
        return run(partial(measures, Embedded(photos, samples, of_base, of_class, prompts)))

    @torch.inference_mode()
    def of_picture(self, picture: Image.Image) -> Tensor:
        """Returns the embedding (1, features) of a picture, of length one, on the host."""
        pixels = self.processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=-1).cpu()

    @torch.inference_mode()
    def of_words(self, words: Sequence[str]) -> Tensor:
        """Returns the embedding (texts, features) of each text, of length one, on the host."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(words), padding=True, truncation=True, max_length=most, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        read = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(self.model.text_projection(read.pooler_output), dim=-1).cpu()


def measures(of: Embedded) -> tuple[float | None, float | None, float | None]:
    """Returns likeness, obedience and how far the class is kept, each from 0 to 1, or None where nobody can tell.

    Likeness is how far the samples are on the way from the base's pictures of anybody (0) to the photos (1), as close
    to each other as those are. Obedience is how much closer a sample is to its own prompt than to the others, over how
    much closer the base's pictures are. The class is kept by how far it moved from where it was: not at all (1), or
    as far as the sitter's pictures are from it (0).
    """
    photos = _between(of.photos)
    anybody = _mean(of.of_base @ of.photos.T)
    likeness = _on_the_way(_mean(of.samples @ of.photos.T), anybody, photos)
    obedience = _on_the_way(_contrast(of.samples, of.prompts), 0.0, _contrast(of.of_base, of.prompts))
    before = of.of_base[: len(of.of_class)]
    sitter = _mean((of.samples[: len(before)] * before).sum(-1))
    kept = _on_the_way(_mean((of.of_class * before).sum(-1)), sitter, 1.0)
    return likeness, obedience, kept


def _on_the_way(value: float, none: float, full: float) -> float | None:
    """Returns how far `value` is from `none` to `full`, from 0 to 1."""
    return None if full - none < LEAST_GAP else min(1.0, max(0.0, (value - none) / (full - none)))


def _contrast(pictures: Tensor, prompts: Tensor) -> float:
    """Returns how much closer pictures are to their own prompts than to those of the others."""
    close = pictures @ prompts.T
    own, count = float(close.diagonal().sum()), len(prompts)
    return own / count - (float(close.sum()) - own) / max(1, count * (count - 1))


def _between(pictures: Tensor) -> float:
    """Returns the mean cosine of two of the pictures."""
    count = len(pictures)
    return (float((pictures @ pictures.T).sum()) - count) / max(1, count * (count - 1))


def _mean(cosines: Tensor) -> float:
    return float(cosines.mean())


def load_encoder(folder: Path, device: str) -> ImageEncoder:
    """Returns the CLIP model in `folder`, on the device, in float32.

    Raises:
        ModelUnavailable: a file is missing, corrupt, a pickle, or of another kind.
    """
    with loading(folder.name, folder, HINT), ONE_LOAD:
        if json.loads((folder / "config.json").read_bytes()).get("model_type") != "clip":
            raise ModelUnavailable(f"{folder.name} is no CLIP model", HINT)
        if not any((folder / name).is_file() for name in TOKENIZERS):  # the library would make one that knows no word
            raise ModelUnavailable(f"{folder.name} has no tokenizer", HINT)
        model: Any = load_model(CLIPModel, folder)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil", **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
        return ImageEncoder(model.requires_grad_(False).eval().to(device), processor, tokenizer)
