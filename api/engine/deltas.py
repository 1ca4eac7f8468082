"""Deltas: a fine-tuned checkpoint as what it changed in its base, so that it shares the base's forwards and memory.

Each weight's change W − W_base is cut to the product of two factors of low rank, which truncated singular values make
the closest there is (Eckart and Young, https://doi.org/10.1007/BF02288367); biases and norms keep theirs whole. What
comes out is a LoRA file. It stands for the checkpoint only if a gate lets it pass: the same prompts and seeds, drawn
with both, must come out as the same pictures. The file says what the gate measured.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from api.engine.adapters import CHECKPOINT, COMPONENTS, Layer, Norm
from api.engine.sources import FoundBase
from api.engine.text2image import STABLE_DIFFUSION
from api.engine.weights import read_header
from api.errors import ModelUnavailable

LEAST_PSNR = 32.0  # decibels, of every picture of the gate: at 32 no difference is seen side by side, at 27 some are
EXACT_BELOW = 4  # times the rank: smaller sides are decomposed exactly, larger ones by random projections
SAMPLES, SAMPLE_BYTES, SAMPLE_EVERY = 64, 4096, 1024 * 1024  # of each file at least and at most, for a fingerprint


@dataclass(frozen=True)
class Delta:
    """What the file of a delta says of itself.

    Attributes:
        base: the model that it is to be added to, as USER_MODELS names it.
        base_fingerprint: of that model.
        fingerprint: of the checkpoint that it stands for.
        rank: of its factors.
        psnr: of each picture of the gate against the checkpoint's own, in decibels.
    """

    base: str
    base_fingerprint: str
    fingerprint: str
    rank: int
    psnr: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether every picture of the gate came out as the checkpoint draws it."""
        return bool(self.psnr) and min(self.psnr) >= LEAST_PSNR


@dataclass(frozen=True)
class Extracted:
    """What a delta holds: the tensors of its file, on the host, and the names of changes that it leaves out."""

    tensors: dict[str, Tensor]
    left_out: list[str]


def check_kind(found: FoundBase) -> None:
    """Raises ModelUnavailable for a model that is no Stable Diffusion: others have no deltas."""
    if found.pipeline != STABLE_DIFFUSION:
        raise ModelUnavailable(f"{found.name} is a {found.pipeline}", "Only Stable Diffusion has deltas.")


def read_delta(file: Path) -> Delta:
    """Returns what a delta's file says of itself. Raises ModelUnavailable when it is none."""
    metadata = read_header(file).get("__metadata__") or {}
    try:
        said = json.loads(metadata[CHECKPOINT])
        return Delta(
            base=str(said["base"]),
            base_fingerprint=str(said["base_fingerprint"]),
            fingerprint=str(said["fingerprint"]),
            rank=int(said["rank"]),
            psnr=tuple(map(float, said["psnr"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelUnavailable(f"{file.name} is not a delta", "Make it anew: sitter delta.") from error


def write_delta(file: Path, tensors: Mapping[str, Tensor], delta: Delta) -> None:
    """Writes a delta's file."""
    save_file(dict(tensors), file, metadata={CHECKPOINT: json.dumps(asdict(delta))})


def fingerprint(found: FoundBase) -> str:
    """Returns what tells a checkpoint from every other: a hash of samples of its files, at once for any size."""
    if found.path.is_file():
        files = [found.path]
    else:
        files = sorted([*found.path.glob("*/*.safetensors"), *found.path.glob("**/*.json")])
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(SAMPLE_BYTES, min(SAMPLE_EVERY, size // SAMPLES))):
                opened.seek(start)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


@torch.no_grad()
def extract(base: StableDiffusionPipeline, checkpoint: StableDiffusionPipeline, rank: int) -> Extracted:
    """Returns what turns `base` into something close to `checkpoint`.

    Args:
        base: in float32, as `checkpoint`.
        checkpoint: what was made of it by training.
        rank: of the factors, at most.

    Raises:
        ModelUnavailable: it was made of another base, or changed what a LoRA cannot.
    """
    if not _alike(base.vae, checkpoint.vae):
        raise ModelUnavailable(
            "the two models have different decoders", "A delta changes the UNet and the text encoder."
        )
    if (base.safety_checker is None) != (checkpoint.safety_checker is None):
        raise ModelUnavailable("one of the two models has a safety checker", "Take a base that is checked alike.")
    made, left_out = dict[str, Tensor](), list[str]()
    for component in COMPONENTS:
        for name, tensor in _changes(getattr(base, component), getattr(checkpoint, component), rank, left_out):
            made[f"{component}.{name}"] = tensor.contiguous().cpu()
    if not made:
        raise ModelUnavailable("the two models are the same")
    return Extracted(made, left_out)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _changes(base: nn.Module, checkpoint: nn.Module, rank: int, left_out: list[str]) -> Iterator[tuple[str, Tensor]]:
    own, other = (dict(module.named_parameters()) for module in (base, checkpoint))
    shapes, others = ({name: tensor.shape for name, tensor in each.items()} for each in (own, other))
    if shapes != others:
        raise ModelUnavailable("the checkpoint was made of another base", "Name the one that it was trained from.")
    changed = {name: other[name].float() - own[name].float() for name in own if not torch.equal(own[name], other[name])}
    for name, layer in base.named_modules():
        weight, bias = (changed.pop(f"{name}.{kind}", None) for kind in ("weight", "bias"))
        if weight is not None and isinstance(layer, Layer):
            down, up = _factors(weight.flatten(1), rank)
            yield f"{name}.lora_A.weight", down.reshape(len(down), *weight.shape[1:]).half()
            yield f"{name}.lora_B.weight", up.reshape(*up.shape, *[1] * (weight.dim() - 2)).half()
        elif weight is not None and isinstance(layer, Norm):
            yield f"{name}.diff", weight
        elif weight is not None:
            changed[f"{name}.weight"] = weight
        if bias is not None:
            yield f"{name}.diff_b", bias
    # What else a UNet has is left as in the base, and the gate tells whether that shows; it cannot know which words a
    # text encoder has learned.
    if changed and not isinstance(base, UNet2DConditionModel):
        raise ModelUnavailable(f"the checkpoint changed {min(changed)}, which no LoRA can", "It is drawn as it is.")
    left_out += changed


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) with B A closest to `change` (out, in)."""
    rank = min(rank, *change.shape)
    if min(change.shape) < EXACT_BELOW * rank:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:  # https://arxiv.org/abs/0909.4061, sections 4.4 and 5.1
        u, s, v = torch.svd_lowrank(change, q=2 * rank, niter=4)
        vh = v.mT
    root = s[:rank].sqrt()  # in halves, so that neither leaves the range of float16
    return root[:, None] * vh[:rank], u[:, :rank] * root


def psnr(pictures: Sequence[Image.Image], expected: Sequence[Image.Image]) -> tuple[float, ...]:
    """Returns the peak signal-to-noise ratio of each picture, in decibels; 100 for equal ones."""
    pairs = zip(pictures, expected, strict=True)
    errors = [np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean() for a, b in pairs]
    return tuple(float(min(100.0, 10 * np.log10(255**2 / max(error, 1e-9)))) for error in errors)
