"""Texts: prompts become embeddings, once for each text and each adapter that changes the encoder."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from api.engine.adapters import Adapter, merged
from api.engine.slots import NotForSlots, Slots

COMPONENT = "text_encoder"
SLOTS = 4  # texts are read one at a time; the others spare a copy to whoever comes again
KEPT_BYTES = 64 * 1024 * 1024


class Texts:
    """What the text encoder of one base says of prompts. For any thread.

    Args:
        pipeline: the base, which stays as it is.
    """

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self._pipeline = pipeline
        self._slots = Slots(pipeline.text_encoder, COMPONENT, SLOTS)
        self._reading = threading.Lock()
        self._known: OrderedDict[tuple[object, bytes], Tensor] = OrderedDict()  # least recently asked for first

    def encode(self, text: str, adapter: Adapter | None) -> Tensor:
        """Returns the embedding (1, tokens, width) of `text`, cut at what the encoder reads."""
        changed = adapter is not None and any(delta.component == COMPONENT for delta in adapter.deltas)
        # A digest: no prompt stays in memory for having been read.
        key = (adapter.key if adapter and changed else None, hashlib.sha256(text.encode()).digest())
        with self._reading:
            if key not in self._known:
                self._known[key] = self._read(text, adapter if changed else None)
            self._known.move_to_end(key)
            embedding = self._known[key]
            while sum(known.nbytes for known in self._known.values()) > KEPT_BYTES:
                self._known.popitem(last=False)
        return embedding

    @property
    def slot_bytes(self) -> int:
        """Returns what the slots take beside the weights."""
        return self._slots.nbytes

    def drop(self, adapter: Adapter) -> None:
        """Forgets an adapter and every text that it was asked to read."""
        self._slots.drop(adapter)
        with self._reading:
            for key in [key for key in self._known if key[0] is adapter.key]:
                del self._known[key]

    def _read(self, text: str, adapter: Adapter | None) -> Tensor:
        if adapter is None:
            return self._embed(self._slots.module, text)
        try:
            slot = self._slots.acquire(adapter)
        except NotForSlots:
            return self._embed(merged(self._pipeline.text_encoder, adapter, COMPONENT), text)
        try:
            with self._slots.rows([slot]):
                return self._embed(self._slots.module, text)
        finally:
            self._slots.release(slot)

    @torch.inference_mode()
    def _embed(self, encoder: Any, text: str) -> Tensor:
        own = StableDiffusionPipeline(
            **{**self._pipeline.components, "text_encoder": encoder}, requires_safety_checker=False
        )
        embedding: Tensor = own.encode_prompt(text, own.device, 1, do_classifier_free_guidance=False)[0]
        return embedding
