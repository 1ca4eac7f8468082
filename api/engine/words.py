"""What the words of a training are to its UNet: embeddings, by the base's encoders or by such as learn, too."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Heard:
    """What a UNet hears: texts (rows, tokens, width); and Stable Diffusion XL's by name, each (rows, …), or None."""

    texts: Tensor
    added: dict[str, Tensor] | None


class Words:
    """Reads words as the base's own drawings do.

    Args:
        pipeline: the base; nothing in it is changed, and others may read with it meanwhile.
        encoders: what reads in place of its own, by component, and changes from step to step; or none, and what was
            read is remembered.
    """

    def __init__(self, pipeline: Any, encoders: Mapping[str, nn.Module]) -> None:
        parts = pipeline.components.items()
        # A tokenizer keeps its padding as state.
        tokenizers = {name: copy.deepcopy(part) for name, part in parts if isinstance(part, PreTrainedTokenizerBase)}
        self._own = copy.copy(pipeline)
        self._own.register_modules(**encoders, **tokenizers)
        self._learns = bool(encoders)
        self._known: dict[str | None, Sequence[Tensor]] = {}

    def read(self, words: Sequence[str], size: tuple[int, int]) -> Heard:
        """Returns what is heard of `words`, with the gradient of the encoders that learn.

        Args:
            words: of each row.
            size: height and width in pixels of the rows' pictures.
        """
        if self._learns:
            return _heard(self._encode(list(words)), size)
        return _heard([torch.cat(parts) for parts in zip(*map(self._recall, words), strict=True)], size)

    @torch.no_grad()
    def silence(self, rows: int, size: tuple[int, int]) -> Heard:
        """Returns what guidance leads away from when nobody says what else, for so many rows; see `read`."""
        parts = self._encode(None) if self._learns else self._recall(None)
        return _heard([part.expand(rows, *part.shape[1:]) for part in parts], size)

    @torch.no_grad()
    def _recall(self, text: str | None) -> Sequence[Tensor]:
        if text not in self._known:  # each alone: the same to the last bit whatever stands beside it
            self._known[text] = self._encode(None if text is None else [text])
        return self._known[text]

    def _encode(self, words: list[str] | None) -> Sequence[Tensor]:
        """Returns texts (words, tokens, width), and of Stable Diffusion XL pooled ones (words, width), too."""
        silent = words is None
        said: Sequence[Tensor] = self._own.encode_prompt(
            prompt=words or [""],
            device=self._own.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=silent,
        )
        return said[silent::2]  # each beside what stands for no words


def _heard(parts: Sequence[Tensor], size: tuple[int, int]) -> Heard:
    texts, *pooled = parts
    if not pooled:
        return Heard(texts, None)
    # A whole picture of that size, as drawings say it (https://arxiv.org/abs/2307.01952, section 2.2).
    sizes = torch.tensor([[*size, 0, 0, *size]], dtype=texts.dtype, device=texts.device)
    return Heard(texts, {"text_embeds": pooled[0], "time_ids": sizes.expand(len(texts), -1)})
