"""How diffusers and peft alone can draw for many users who share a base: the ways A to F of the bench `engine`.

Every kindness that costs them nothing is granted: state dicts stay in memory, models are copied and not read again,
text encoder and autoencoder are shared, and pictures are decoded one by one, which is faster on a CPU. The LoRAs change
the UNet alone: diffusers cannot swap those of a text encoder in place.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from api.schemas import GenerateRequest

T = TypeVar("T")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Given:
    """What every arm is given: where the base lies, user → LoRA, and the bytes that users' models may take.

    `compiled` grants torch.compile to those that can have it: C, and the service.
    """

    folder: Path
    loras: Mapping[str, Path]
    budget: int
    highest_rank: int
    dtype: torch.dtype = torch.float32
    compiled: bool = False


class Way(Protocol):
    """How an arm with one drawing thread draws."""

    def hold(self, users: Sequence[str]) -> None:
        """Loads the users' models as their requests would, the last user's last."""

    def together(self, first: GenerateRequest, other: GenerateRequest) -> bool:
        """Whether one batch can hold both."""

    def draw(self, requests: Sequence[GenerateRequest]) -> list[Image.Image]:
        """Returns the picture of each request."""


class Held(Generic[T]):
    """Users' models in memory up to a budget, least recently used out.

    Args:
        budget: bytes; the last one used stays even over it.
        load: returns the model of a user and its bytes.
        drop: told of each user whose model leaves.
    """

    def __init__(
        self, budget: int, load: Callable[[str], tuple[T, int]], drop: Callable[[str], object] = lambda user_id: None
    ) -> None:
        self._budget = budget
        self._load = load
        self._drop = drop
        self._models: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, user_id: str) -> T:
        """Returns the user's model, loading it if need be."""
        if user_id not in self._models:
            self._models[user_id] = self._load(user_id)
            while len(self._models) > 1 and sum(size for _, size in self._models.values()) > self._budget:
                self._drop(self._models.popitem(last=False)[0])
        self._models.move_to_end(user_id)
        return self._models[user_id][0]


class OwnPipelines:
    """A: a pipeline for each user, the LoRA merged into a UNet of their own."""

    def __init__(self, given: Given, base: Any) -> None:
        self._given = given
        self._base = base
        self._pipelines = Held(given.budget, self._load)

    def hold(self, users: Sequence[str]) -> None:
        for user_id in users:
            self._pipelines.get(user_id)

    def together(self, first: GenerateRequest, other: GenerateRequest) -> bool:
        return False

    def draw(self, requests: Sequence[GenerateRequest]) -> list[Image.Image]:
        return _draw(self._pipelines.get(requests[0].user_id), requests)

    def _load(self, user_id: str) -> tuple[Any, int]:
        pipeline = _with_own_unet(self._base)
        pipeline.load_lora_weights(self._given.loras[user_id])
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()  # the merged weights stay
        return pipeline, bytes_of(pipeline.unet)


class OneBase:
    """What B to F have in common: one pipeline, and the state dicts of its LoRAs."""

    def __init__(self, given: Given, base: Any) -> None:
        self._given = given
        self._pipeline = _with_own_unet(base)
        self._states = Held(given.budget, self._read)

    def hold(self, users: Sequence[str]) -> None:
        for user_id in users:
            self._states.get(user_id)

    def together(self, first: GenerateRequest, other: GenerateRequest) -> bool:
        return False

    def _read(self, user_id: str) -> tuple[dict[str, Tensor], int]:
        state = load_file(self._given.loras[user_id], DEVICE)
        return state, sum(tensor.nbytes for tensor in state.values())


class LoadEach(OneBase):
    """B: the LoRA loaded for each request, and unloaded after it."""

    def draw(self, requests: Sequence[GenerateRequest]) -> list[Image.Image]:
        self._pipeline.load_lora_weights(self._states.get(requests[0].user_id))
        try:
            return _draw(self._pipeline, requests)
        finally:
            self._pipeline.unload_lora_weights()


class HotSwap(OneBase):
    """C: the LoRA copied over the one before, in a UNet that may be compiled once it has the first."""

    def __init__(self, given: Given, base: Any) -> None:
        super().__init__(given, base)
        self._pipeline.enable_lora_hotswap(target_rank=given.highest_rank)
        self._loaded: str | None = None

    def draw(self, requests: Sequence[GenerateRequest]) -> list[Image.Image]:
        user_id = requests[0].user_id
        if user_id != self._loaded:
            state = self._states.get(user_id)
            if self._loaded is None:  # peft makes these very tensors its parameters, and later writes others over them
                state = {name: tensor.clone() for name, tensor in state.items()}
            self._pipeline.load_lora_weights(state, adapter_name="lora", hotswap=self._loaded is not None)
            if self._loaded is None and self._given.compiled:
                self._pipeline.unet.compile(fullgraph=True, mode="reduce-overhead" if DEVICE == "cuda" else None)
            self._loaded = user_id
        return _draw(self._pipeline, requests)


class SameUser(HotSwap):
    """F: as C, and requests of one user share a batch."""

    def together(self, first: GenerateRequest, other: GenerateRequest) -> bool:
        return first.user_id == other.user_id and _alike(first, other)


class MixedBatch(OneBase):
    """D: every user's LoRA held as a peft adapter, and a batch whose rows have different ones.

    diffusers takes no `adapter_names` for a UNet, so a hook on each peft layer passes them on.
    """

    def __init__(self, given: Given, base: Any) -> None:
        super().__init__(given, base)
        self._adapters = Held(given.budget, self._add, self._remove)
        self._rows: list[str] = []

    def hold(self, users: Sequence[str]) -> None:
        for user_id in users:
            self._adapters.get(user_id)

    def together(self, first: GenerateRequest, other: GenerateRequest) -> bool:
        return _alike(first, other)

    def draw(self, requests: Sequence[GenerateRequest]) -> list[Image.Image]:
        users = [request.user_id for request in requests]
        self.hold(users)
        self._rows = users * 2  # the negative prompt's rows come first
        return _draw(self._pipeline, requests)

    def _add(self, user_id: str) -> tuple[None, int]:
        state, size = self._read(user_id)
        known = set(self._layers())
        self._pipeline.load_lora_weights(state, adapter_name=user_id)
        for layer in set(self._layers()) - known:
            layer.register_forward_pre_hook(self._name_adapters, with_kwargs=True)
        return None, size

    def _remove(self, user_id: str) -> None:
        self._pipeline.delete_adapters(user_id)

    def _layers(self) -> list[nn.Module]:
        return [module for module in self._pipeline.unet.modules() if isinstance(module, LoraLayer)]

    def _name_adapters(
        self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {**named, "adapter_names": self._rows}


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the pipeline of `folder` on the device, its convolutions as the service has them."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what D is about
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype).to(DEVICE)
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)
    return pipeline


def bytes_of(module: nn.Module) -> int:
    """Returns the bytes of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _with_own_unet(base: Any) -> Any:
    """Returns a pipeline with a UNet and a scheduler of its own, which share nothing that a drawing changes."""
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    own = {**base.components, "unet": copy.deepcopy(base.unet), "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**own, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _alike(first: GenerateRequest, other: GenerateRequest) -> bool:
    """Whether one call of a pipeline, which has one number of steps and one guidance, can draw both."""
    asked = ((one.num_inference_steps, one.guidance_scale) for one in (first, other))
    return len(set(asked)) == 1


def _draw(pipeline: Any, requests: Sequence[GenerateRequest]) -> list[Image.Image]:
    """Returns the pictures of requests that differ in prompt and seed alone."""
    latents = pipeline(
        prompt=[request.prompt for request in requests],
        num_inference_steps=requests[0].num_inference_steps,
        guidance_scale=requests[0].guidance_scale,
        guidance_rescale=pipeline.scheduler.config.get("_guidance_rescale", 0.0),
        width=requests[0].width,
        height=requests[0].height,
        generator=[torch.Generator().manual_seed(request.seed or 0) for request in requests],
        output_type="latent",
    ).images
    images = []
    for one in latents.split(1):
        pixels = pipeline.vae.decode(one / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        images += pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images
