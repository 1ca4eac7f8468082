"""Counts faces in photos, by a detector that the operator configured (FACE_DETECTOR).

Any object detection of transformers will do whose labels name faces, or else people: YOLOS (arXiv:2106.00666), DETR…
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from api.engine.batch import Batch
from api.engine.components import NO_CODE, ONE_LOAD, load_model
from api.engine.examples import Check
from api.engine.threads import in_own_thread
from api.engine.weights import loading
from api.errors import ModelUnavailable

LEAST_SCORE = 0.7  # of a face that counts: one that fills a photo has 0.9 and more, what only resembles one about 0.5
SAME = 0.5  # share of two boxes' union that both cover, from which on they are of one face
SOUGHT = ("face", "person")  # in labels; the first that any of them names
HINT = "Check FACE_DETECTOR."


@dataclass(frozen=True)
class Detector:
    """A model that finds objects, what prepares pictures for it, and which of its labels count."""

    model: Any
    processor: Any
    labels: frozenset[int]

    @torch.inference_mode()
    def count(self, photo: bytes) -> int:
        """Returns how many faces, or people, a photo (PNG) shows."""
        with Image.open(io.BytesIO(photo), formats=("PNG",)) as opened:
            image = opened.convert("RGB")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.model.device)
        size = [(image.height, image.width)]
        [found] = self.processor.post_process_object_detection(
            self.model(pixel_values=pixels), threshold=LEAST_SCORE, target_sizes=size
        )
        order = found["scores"].argsort(descending=True)
        return len(distinct([found["boxes"][at] for at in order if int(found["labels"][at]) in self.labels]))


def load_detector(folder: Path, device: str) -> Detector:
    """Returns the detector in `folder`, on the device, in float32.

    Raises:
        ModelUnavailable: a file is missing, corrupt, a pickle, or of a model that names neither faces nor people.
    """
    with loading(folder.name, folder, HINT), ONE_LOAD:
        model: Any = load_model(AutoModelForObjectDetection, folder, **NO_CODE)
        labels = labels_of(model.config.id2label)
        if not labels:
            raise ModelUnavailable(f"{folder.name} names neither faces nor people in its labels", HINT)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil", **NO_CODE)
        return Detector(model.requires_grad_(False).eval().to(device), processor, labels)


def labels_of(names: Mapping[int, str]) -> frozenset[int]:
    """Returns the numbers of the labels that count, of all labels by number."""
    for sought in SOUGHT:
        if found := {number for number, name in names.items() if re.search(rf"\b{sought}s?\b", name.lower())}:
            return frozenset(found)
    return frozenset()


def distinct(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Returns those of the boxes (left, top, right, bottom) that are not of the same face as one before them."""
    kept = list[Tensor]()
    for box in boxes:
        if all(_overlap(box, other) < SAME for other in kept):
            kept.append(box)
    return kept


def _overlap(one: Tensor, other: Tensor) -> float:
    """Returns the share of what two boxes cover together that both cover."""
    shared = _area(torch.cat([torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])]))
    return shared / max(1e-6, _area(one) + _area(other) - shared)


def _area(box: Tensor) -> float:
    return float((box[2:] - box[:2]).clamp(min=0).prod())


def count_faces(folder: Path, device: str, batch: Batch, photos: Iterable[bytes], check: Check) -> list[int]:
    """Returns how many faces each photo (PNG) shows, by the detector in `folder`, loaded for that alone.

    One photo at a time, behind the drawings of others. Raises ModelUnavailable.
    """
    detector, counts = in_own_thread(partial(load_detector, folder, device)), list[int]()
    for photo in photos:
        check()
        counts.append(batch.run_behind(partial(detector.count, photo)))
    return counts
