"""Engine: one device. It loads bases and adapters for the cache and draws with them; the service knows only this."""

import gc
import hashlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import diffusers
import structlog
import torch
import transformers
from diffusers import AutoencoderTiny

from api.config import ModelSource, Settings, locate
from api.engine import components, deltas, sources, weights
from api.engine.adapters import Adapter, find_adapter_file, load_adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.cache import Loaded
from api.engine.candidates import Ground, require_folder
from api.engine.combined import combined, name_of
from api.engine.dreambooth import OnReport, Trained, train
from api.engine.encoder import load_encoder
from api.engine.examples import Check
from api.engine.faces import count_faces
from api.engine.host import free_host_bytes
from api.engine.judge import Judge
from api.engine.knee import Knee
from api.engine.learned import components_of, step_bytes
from api.engine.lesson import Lesson
from api.engine.own import OwnModel
from api.engine.pipeline import Drawing, OnStep, draw, draw_stock, drawn_size
from api.engine.preview import fitted
from api.engine.reader import load_reader
from api.engine.shelf import LeasedModel
from api.engine.sources import FoundBase
from api.engine.stock import StockBase
from api.engine.stock_adapters import StockAdapter, load_stock_adapter
from api.engine.text2image import STABLE_DIFFUSION
from api.engine.threads import in_own_thread
from api.engine.trainer import require_trainable
from api.engine.warming import warm
from api.errors import DeviceLost, ModelUnavailable, OutOfMemory, SitterError
from api.schemas import GenerateRequest

AnyBase: TypeAlias = Base | StockBase
AnyAdapter: TypeAlias = Adapter | StockAdapter
Decoder: TypeAlias = AutoencoderTiny

log = structlog.get_logger()

USUAL_SIDE = 512  # pixels, that a compiled model is warmed for; others wait for it once
HOST_SHARE = 0.5
GPU_SHARE = 0.7


class Engine:
    """Loads and draws on one device.

    Args:
        settings: device, precision, threads and budgets.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        diffusers.utils.logging.set_verbosity_error()  # whatever the environment says: its warnings quote prompts
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", "`upcast_vae` is deprecated", FutureWarning)  # said of its own call
        self._pool = weights.TensorPool()
        self._placement = components.choose_placement(settings)
        if settings.cpu_threads:
            torch.set_num_threads(settings.cpu_threads)
        self._bases: weakref.WeakSet[Base] = weakref.WeakSet()  # those with slots
        self._counting = threading.Lock()  # of them
        self._combinations: weakref.WeakValueDictionary[object, Adapter] = weakref.WeakValueDictionary()
        self._combining = threading.Lock()
        self._batch = Batch(
            settings.batch_rows,
            self.free_memory,
            Knee(settings.batch_rows),
            takes_work=self.device == "cpu",
            share=settings.training_share,
        )

    @property
    def device(self) -> str:
        """Returns `cuda`, `mps` or `cpu`."""
        return self._placement.device

    @property
    def dtype(self) -> str:
        """Returns the precision of the weights, as in `float16`."""
        return str(self._placement.dtype).removeprefix("torch.")

    @property
    def threads(self) -> int:
        """Returns the CPU threads that one drawing uses."""
        return torch.get_num_threads()

    def free_bytes(self, device: str) -> int:
        """Returns the memory that is free on `device` now."""
        if device == "cuda":
            return int(torch.cuda.mem_get_info()[0])
        return free_host_bytes()  # an Apple GPU shares the host's

    def check_device(self) -> None:
        """Raises DeviceLost when the device can draw no more; never waits for a drawing."""
        try:  # after a sticky error every call to the driver fails
            if self.device == "cuda":
                torch.cuda.mem_get_info()
            elif self.device == "mps":
                torch.mps.driver_allocated_memory()
        except RuntimeError as error:
            raise DeviceLost(f"the GPU has failed: {str(error).splitlines()[0]}") from error

    def budgets(self) -> dict[str, int]:
        """Returns device → bytes that models may take: as set, else a share of what is free now."""
        budgets = {"cpu": int(self._settings.host_cache_gb * 1e9 or self.free_bytes("cpu") * HOST_SHARE)}
        if self.device != "cpu":
            budgets[self.device] = int(self._settings.gpu_cache_gb * 1e9 or self.free_bytes(self.device) * GPU_SHARE)
        return budgets

    def slot_bytes(self) -> int:
        """Returns what the slots of all bases in memory take, on the device and beside the budgets."""
        return sum(base.slot_bytes for base in self._in_memory())

    def check_slots(self) -> None:
        """Raises AccountingOff when a slot of some base is lost, or two adapters are said to be in one."""
        for base in self._in_memory():
            base.check()

    def _in_memory(self) -> list[Base]:
        with self._counting:
            return list(self._bases)

    def find_base(self, source: ModelSource) -> FoundBase:
        """Returns where the base is on this disk, downloaded if need be. Raises ModelUnavailable."""
        return sources.find_base(source, self._settings)

    def base_bytes(self, found: FoundBase) -> dict[str, int]:
        """Returns device → bytes that loading the base takes: float32 on the host first, then its place."""
        if found.pipeline != STABLE_DIFFUSION:
            return self._stock_bytes(found)
        values = sources.count_values(found.path)
        on_host = {"cpu": torch.float32.itemsize * values}
        return on_host if self.device == "cpu" else {**on_host, self.device: self._placement.dtype.itemsize * values}

    def _stock_bytes(self, found: FoundBase) -> dict[str, int]:
        """As `base_bytes`: in float32 is one of its models at a time."""
        values = sources.values_by_component(found.path).values()
        itemsize = self._placement.one_dtype.itemsize
        placed, largest = itemsize * sum(values), torch.float32.itemsize * max(values)
        if self.device != "cpu":
            return {"cpu": largest, self.device: placed}
        return {"cpu": placed if itemsize == torch.float32.itemsize else placed + largest}

    def is_downloaded(self, source: ModelSource) -> bool:
        """Whether the base is on this disk, so that loading it asks no hub."""
        return sources.is_downloaded(source)

    def load_base(self, found: FoundBase) -> Loaded[AnyBase]:
        """Returns the base, on the device. Raises ModelUnavailable, OutOfMemory or DeviceLost."""
        with self._told_apart():
            base = in_own_thread(partial(self._load, found, self._settings.compile))
        if isinstance(base, Base):
            with self._counting:
                self._bases.add(base)
            if self._settings.compile and base.fits_the_batch:
                self._warm(base)
        modules = (part for part in base.pipeline.components.values() if isinstance(part, torch.nn.Module))
        tensors = (tensor for module in modules for tensor in weights.tensors_of(module))
        return Loaded(base, weights.storages_of(tensors))

    def _load(self, found: FoundBase, compiled: bool = False) -> AnyBase:
        if found.pipeline != STABLE_DIFFUSION:
            return StockBase(components.load_stock(found, self._placement, self._pool))
        pipeline = components.load_pipeline(found, self._placement, self._pool)
        fitted(pipeline.vae)  # now: the step loop shall not wait for it
        return Base(pipeline, slots=self._settings.batch_rows, compiled=compiled)

    def _warm(self, base: Base) -> None:
        width, height = drawn_size(base.pipeline, USUAL_SIDE, USUAL_SIDE)
        cell = base.pipeline.vae_scale_factor
        began = time.perf_counter()
        try:
            warm(base, self._batch, self._settings.batch_rows, width // cell, height // cell)
        except SitterError:
            raise
        except Exception as error:  # as where there is no compiler; whatever else it is will show without one, too
            log.warning("not_compiled", reason=(str(error).strip() or type(error).__name__).splitlines()[0])
            base.run_plain()
        else:
            log.info("compiled", seconds=round(time.perf_counter() - began, 1))

    def delta_over(self, source: ModelSource) -> ModelSource:
        """Returns the base and the delta that are drawn in place of the checkpoint of `source`.

        Raises:
            ModelUnavailable: the delta is not there, did not pass its gate, or is of other models than these are now.
        """
        assert source.delta is not None
        delta = deltas.read_delta(locate(source.delta))
        over = ModelSource(base=delta.base, lora=source.delta)
        if not delta.passed:
            raise ModelUnavailable(f"{source.delta} is too far off {source.base}", "Make one of a higher rank.")
        for model, known in ((source.itself(), delta.fingerprint), (over.without_lora(), delta.base_fingerprint)):
            if deltas.fingerprint(self.find_base(model)) != known:
                raise ModelUnavailable(
                    f"{source.delta} was made for another {model.base}", "Make it anew: sitter delta."
                )
        return over

    def find_adapter(self, source: ModelSource) -> Path:
        """Returns the weight file of the LoRA of `source`. Raises ModelUnavailable."""
        assert source.lora is not None
        file = find_adapter_file(locate(source.lora))
        if isinstance(source, OwnModel):
            with weights.loading(source.model_id, file), file.open("rb") as opened:
                source.require_unchanged(hashlib.file_digest(opened, "sha256").hexdigest())
        return file

    def hash_of(self, found: FoundBase) -> str:
        """Returns what tells a base from every other."""
        return deltas.fingerprint(found)

    def adapter_bytes(self, file: Path, base: AnyBase) -> dict[str, int]:
        """Returns device → bytes that loading the LoRA in `file` takes."""
        return {"cpu" if isinstance(base, Base) else self.device: file.stat().st_size}

    def load_adapter(self, file: Path, base: AnyBase, strength: float) -> Loaded[AnyAdapter]:
        """Returns the LoRA in `file`, checked against its base.

        It is on the host, or on the device if its base is drawn by the stock call.

        Raises ModelUnavailable, OutOfMemory or DeviceLost.
        """
        if isinstance(base, StockBase):
            with self._told_apart():
                changed = in_own_thread(partial(load_stock_adapter, file, base.pipeline, strength))
            # The base's own weights are among its tensors: it keeps them in memory even when its base has left.
            return Loaded(changed, weights.storages_of(changed.tensors()))
        with self._told_apart():
            adapter = in_own_thread(partial(load_adapter, file, base.pipeline, strength))
            if self.device == "cuda":
                adapter = in_own_thread(adapter.pinned)

        def drop() -> None:
            for in_memory in self._in_memory():  # the base may have left and come back meanwhile
                in_memory.drop(adapter)

        return Loaded(adapter, weights.storages_of(adapter.tensors()), drop)

    def combine(self, parts: Sequence[tuple[AnyAdapter, float]], *, fast: bool) -> Adapter:
        """Returns one adapter that does what all of `parts` do, each as much as it counts.

        Args:
            parts: which, and how much each counts.
            fast: whether the last is what the base draws few steps with.

        Raises OutOfMemory; ModelUnavailable when its base cannot have several.
        """
        adapters = [(adapter, weight) for adapter, weight in parts if isinstance(adapter, Adapter)]
        if len(adapters) < len(parts):
            raise ModelUnavailable("over this base a LoRA cannot be weighed or mixed", "Draw with one model, whole.")
        with self._combining:
            known = self._combinations.get(name_of(adapters))
            if known is None:
                with self._told_apart():
                    known = in_own_thread(partial(combined, adapters, fast=fast))
                self._combinations[known.key] = known
        return known

    def decoder_bytes(self, folder: Path) -> dict[str, int]:
        """Returns device → bytes that loading the tiny autoencoder in `folder` takes."""
        return {self.device: sum(file.stat().st_size for file in folder.glob("*.safetensors"))}

    def load_decoder(self, folder: Path) -> Loaded[Decoder]:
        """Returns the tiny autoencoder in `folder`. Raises ModelUnavailable, OutOfMemory or DeviceLost."""
        with self._told_apart():
            decoder = in_own_thread(partial(components.load_decoder, folder, self._placement))
        return Loaded(decoder, weights.storages_of(weights.tensors_of(decoder)))

    def check_decoder(self, decoder: Decoder, base: AnyBase) -> None:
        """Raises ModelUnavailable when the decoder is for other latents than the base's."""
        theirs, ours = base.pipeline.vae.config, decoder.config
        if (theirs.latent_channels, len(theirs.block_out_channels)) != (
            ours.latent_channels,
            len(ours.decoder_block_out_channels),
        ):
            raise ModelUnavailable("the decoder of FAST_MODELS is for other latents than this base's")

    def draw(
        self,
        model: LeasedModel,
        request: GenerateRequest,
        seed: int,
        on_step: OnStep,
        check: Callable[[], None] = lambda: None,
    ) -> Drawing:
        """Draws the request, beside what other threads draw; see `pipeline.draw`.

        Raises OutOfMemory and DeviceLost besides.
        """
        base, adapter = model.base, model.adapter
        with self._told_apart():
            if isinstance(base, StockBase):
                assert not isinstance(adapter, Adapter)  # it was loaded for this base
                return draw_stock(base, adapter, request, seed, on_step, check)
            assert not isinstance(adapter, StockAdapter)
            return draw(base, adapter, request, seed, self._batch, on_step, check, model.decoder)

    def training_bytes(self, base: AnyBase, source: ModelSource, lesson: Lesson) -> dict[str, int]:
        """Returns device → bytes that a training takes beside the base; of factors it is nothing to speak of.

        Raises ModelUnavailable or InvalidRequest when the base, which is that of `source`, cannot be trained so.
        """
        require_trainable(base.pipeline)
        if lesson.kind == "lora":
            return {}
        require_folder(self.find_base(source))
        learning = step_bytes(base.pipeline, components_of(base.pipeline, texts=lesson.train_text_encoder))
        return {"cpu": learning, self.device: learning}  # on the host there is its state while that is saved

    def train(
        self, base: AnyBase, source: ModelSource, lesson: Lesson, folder: Path, report: OnReport, check: Check
    ) -> Trained:
        """Trains a sitter over `base`, which is that of `source`, behind what others draw; see `dreambooth.train`.

        Raises ModelUnavailable, OutOfMemory and DeviceLost besides.
        """
        found = self.find_base(source)
        ground = Ground(base, found, deltas.fingerprint(found), self._batch, self._load)
        with self._told_apart():
            open_judge = partial(self._open_judge, source.base)
            return train(ground, lesson, folder, self._settings.data_dir / "priors", open_judge, report, check)

    def _open_judge(self, base: str) -> Judge | None:
        """Loads what measures the samples of a training over `base`, if anything does."""
        if reader := self._settings.judges.get(base):
            return self._batch.run_behind(partial(load_reader, locate(reader)))
        if encoder := self._settings.judge_encoder:
            return in_own_thread(partial(load_encoder, encoder, self.device))
        return None

    def count_faces(self, photos: Sequence[bytes], check: Check) -> list[int]:
        """Returns how many faces each photo (PNG) shows, by FACE_DETECTOR, which is set; see `faces.count_faces`.

        Raises OutOfMemory and DeviceLost besides.
        """
        assert self._settings.face_detector is not None
        with self._told_apart():
            return count_faces(self._settings.face_detector, self.device, self._batch, photos, check)

    def close(self) -> None:
        """Ends what is drawn after its step under way; it and whatever comes raises ShuttingDown."""
        self._batch.close()

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Tells what fails for want of memory, and what fails because the device is gone, from all else."""
        try:
            with _our_out_of_memory():
                yield
        except (RuntimeError, ModelUnavailable):  # the second of a file, or of a load that the device ended?
            self.check_device()
            raise

    def free_memory(self) -> None:
        """Hands memory that nothing refers to back to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        elif self.device == "mps":
            torch.mps.empty_cache()


@contextmanager
def _our_out_of_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not weights.is_out_of_memory(error):
            raise
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "computer"
        raise OutOfMemory(f"the {where} has no memory left for this picture") from error
