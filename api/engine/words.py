"""What the words of a training are to its UNet: embeddings, by the base's encoders or by such as learn, too."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


class Words:
    """Reads words as the base's own drawings do.

    Args:
        pipeline: the base; nothing in it is changed, and others may read with it meanwhile.
        encoders: what reads in place of its own, by component, and changes from step to step; or none, and what was
            read is remembered.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, encoders: Mapping[str, nn.Module]) -> None:
        parts = pipeline.components.items()
        # A tokenizer keeps its padding as state.
        tokenizers = {name: copy.deepcopy(part) for name, part in parts if isinstance(part, PreTrainedTokenizerBase)}
        self._own: Any = copy.copy(pipeline)
        self._own.register_modules(**encoders, **tokenizers)
        self._learns = bool(encoders)
        self._known: dict[str, Tensor] = {}

    def read(self, words: Sequence[str]) -> Tensor:
        """Returns the embeddings (words, tokens, width), with the gradient of the encoders that learn."""
        if self._learns:
            return self._encode(list(words))
        with torch.no_grad():
            return torch.cat([self._recall(text) for text in words])

    def _recall(self, text: str) -> Tensor:
        if text not in self._known:  # each alone: the same to the last bit whatever stands beside it
            self._known[text] = self._encode([text])
        return self._known[text]

    def _encode(self, words: list[str]) -> Tensor:
        texts: Tensor = self._own.encode_prompt(words, self._own.device, 1, do_classifier_free_guidance=False)[0]
        return texts
