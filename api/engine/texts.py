"""Texts: prompts become embeddings, once for each text and each adapter that changes the encoder."""

import hashlib
import math
import threading
from collections import OrderedDict
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from api.engine.adapters import Adapter
from api.engine.combined import is_made_of
from api.engine.slots import Slots

COMPONENT = "text_encoder"
KEPT_BYTES = 64 * 1024 * 1024

# One text at a time in the whole process: a tokenizer keeps its padding as state, and several bases may share one.
_reading = threading.Lock()


class Texts:
    """What the text encoder of one base says of prompts. For any thread.

    Args:
        pipeline: the base, which stays as it is.
    """

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self._pipeline = pipeline
        self._slots = self._new_slots()
        self._keeping = threading.Lock()
        self._known: OrderedDict[tuple[object, bytes], Tensor] = OrderedDict()  # least recently asked for first

    def encode(self, text: str, adapter: Adapter | None) -> Tensor:
        """Returns the embedding (1, tokens, width) of `text`, cut at what the encoder reads."""
        if adapter is not None and not adapter.of(COMPONENT):
            adapter = None
        # A digest: no prompt stays in memory for having been read.
        key = (adapter and adapter.key, hashlib.sha256(text.encode()).digest())
        if (known := self._recall(key)) is not None:
            return known
        with _reading:
            if (known := self._recall(key)) is not None:
                return known
            embedding = self._read(self._slots, text, adapter)
        with self._keeping:
            self._known[key] = embedding
            while sum(kept.nbytes for kept in self._known.values()) > KEPT_BYTES:
                self._known.popitem(last=False)
        return embedding

    def encode_alone(self, text: str, adapter: Adapter | None) -> Tensor:
        """Returns the same, computed as if nobody else had an adapter here: the same to the last bit each time."""
        with _reading:
            return self._read(self._new_slots(), text, adapter)

    def beyond(self, text: str) -> str:
        """Returns the end of `text` that the encoder does not read, empty where it reads all."""
        tokenizer = self._pipeline.tokenizer
        with _reading:
            most = tokenizer.model_max_length
            tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
        if len(tokens.input_ids) <= most:
            return ""
        start, _ = tokens.offset_mapping[most - 1]  # the last place that is read is the end token's
        return text[start:]

    @property
    def slot_bytes(self) -> int:
        """Returns what the slot takes beside the weights."""
        return self._slots.nbytes

    def check(self) -> None:
        """Raises AccountingOff when the slot is lost."""
        self._slots.check()

    def drop(self, adapter: Adapter) -> None:
        """Forgets an adapter and every text that it was asked to read."""
        self._slots.drop(adapter)
        with self._keeping:
            for key in [key for key in self._known if is_made_of(key[0], adapter.key)]:
                del self._known[key]

    def _new_slots(self) -> Slots:
        # One slot, of any rank: texts are read one at a time, and each but once.
        return Slots(self._pipeline.text_encoder, COMPONENT, count=1, highest_rank=math.inf)

    def _recall(self, key: tuple[object, bytes]) -> Tensor | None:
        with self._keeping:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key]

    def _read(self, slots: Slots, text: str, adapter: Adapter | None) -> Tensor:
        if adapter is None:
            return self._embed(slots.module, text)
        slot = slots.acquire(adapter)
        try:
            with slots.rows([slot]):
                return self._embed(slots.module, text)
        finally:
            slots.release(slot)

    @torch.inference_mode()
    def _embed(self, encoder: Any, text: str) -> Tensor:
        own = StableDiffusionPipeline(
            **{**self._pipeline.components, "text_encoder": encoder}, requires_safety_checker=False
        )
        embedding: Tensor = own.encode_prompt(text, own.device, 1, do_classifier_free_guidance=False)[0]
        return embedding
