import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from api.config import ModelSource, locate
from api.engine.components import (
    Placement,
    choose_placement,
    load_pipeline,
)
from api.engine.sources import FoundBase, check_folder, count_values
from api.engine.weights import TensorPool
from api.errors import ModelUnavailable
from tests import builders

CPU = Placement("cpu", torch.float32, torch.float32)
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT, TEXT_BIAS = "text_encoder/model.safetensors", "final_layer_norm.bias"


def found(source: ModelSource, path: Path) -> FoundBase:
    return FoundBase(source.base, path, locate(source.config) if source.config else None)


def load(source: ModelSource, path: Path, placement: Placement = CPU) -> Any:
    return load_pipeline(found(source, path), placement, TensorPool())


def load_folder(folder: Path, placement: Placement = CPU) -> Any:
    return load(builders.source(folder), folder, placement)


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder")
    return {f"{part}.{key}": value for part in parts for key, value in getattr(pipeline, part).state_dict().items()}


def equal(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in some.items())


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the base to break."""
    return builders.copy_of(base_folder, tmp_path / "broken")


def test_a_folder_becomes_a_pipeline_ready_to_draw(base_folder: Path) -> None:
    pipeline = load_folder(base_folder)
    assert equal(weights(pipeline), weights(builders.pipeline()))
    modules = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    assert not any(module.training for module in modules)
    assert {(p.device.type, p.dtype, p.requires_grad) for m in modules for p in m.parameters()} == {
        ("cpu", torch.float32, False)
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_take_the_precision_asked_for(base_folder: Path, dtype: torch.dtype) -> None:
    pipeline = load_folder(base_folder, Placement("cpu", dtype, torch.float32))
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    precisions = [{parameter.dtype for parameter in module.parameters()} for module in modules]
    assert precisions == [{dtype}, {dtype}, {torch.float32}]


def test_two_models_share_what_is_equal(base_folder: Path, tmp_path: Path) -> None:
    other = builders.save_pipeline(tmp_path / "other", seed=1)
    pool = TensorPool()
    first, second = (load_pipeline(FoundBase("base", path), CPU, pool) for path in (base_folder, other))
    assert first.vae.decoder.conv_in.weight is second.vae.decoder.conv_in.weight
    assert first.unet.conv_in.weight is not second.unet.conv_in.weight
    assert first.tokenizer is second.tokenizer
    assert first.unet is not second.unet
    assert first.scheduler is not second.scheduler


def test_models_load_whole_on_several_threads(base_folder: Path, checkpoint: Path) -> None:
    pool, start, expected = TensorPool(), threading.Barrier(4), weights(builders.pipeline())
    folder, file = builders.source(base_folder), builders.source(checkpoint, config=str(base_folder))

    def work(index: int) -> bool:
        start.wait(30)
        source, path = (folder, base_folder) if index % 2 else (file, checkpoint)
        return equal(weights(load_pipeline(found(source, path), CPU, pool)), expected)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: builders.edit_json(folder / "model_index.json", change)


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def void(_: object) -> None:
    """Drops a result."""


def cut(folder: Path) -> None:
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[: len(whole) // 2])


def only_pickle(folder: Path) -> None:
    (folder / UNET).unlink()
    torch.save({"a": torch.ones(1)}, folder / "unet/diffusion_pytorch_model.bin")


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = torch.ones(9, 4, 3, 3)
    save_file(tensors, folder / UNET)


def without(name: str, tensor: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        del tensors[tensor]
        save_file(tensors, folder / name)

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "broken has no model_index.json"),
    "index is not JSON": (replace("model_index.json", b"{"), "model_index.json cannot be read"),
    "index is not text": (replace("model_index.json", b"\xff\x00"), "model_index.json cannot be read"),
    "index is a list": (replace("model_index.json", b"[]"), "model_index.json cannot be read"),
    "index is too deep": (replace("model_index.json", b"[" * 100_000), "model_index.json cannot be read"),
    "index without class": (index(lambda i: i.pop("_class_name")), "model_index.json cannot be read"),
    "another pipeline": (
        index(lambda i: i.update(_class_name="StableDiffusionInpaintPipeline")),
        "broken is a StableDiffusionInpaintPipeline",
    ),
    "own pipeline code": (index(lambda i: i.update(_class_name=["my_code", "StableDiffusionPipeline"])), "my_code"),
    "foreign library": (index(lambda i: i.update(unet=["os", "system"])), "code from os, which is refused"),
    "foreign class": (index(lambda i: i.update(unet=["diffusers", "NoSuchModel"])), "does not load"),
    "class of another part": (index(lambda i: i.update(unet=["diffusers", "AutoencoderKL"])), "does not load"),
    "no unet in the index": (index(lambda i: i.update(unet=[None, None])), "unet"),
    "no tokenizer in the index": (index(lambda i: i.update(tokenizer=[None, None])), "tokenizer"),
    "no vae in the index": (index(lambda i: i.pop("vae")), "vae"),
    "no text encoder in the index": (index(lambda i: i.update(text_encoder=[None, None])), "text_encoder"),
    "no scheduler in the index": (index(lambda i: i.update(scheduler=[None, None])), "scheduler"),
    "pickle only": (only_pickle, "broken/unet has no safetensors file"),
    "unet cut short": (cut, r"diffusion_pytorch_model\.safetensors was cut short"),
    "unet empty": (replace(UNET, b""), "not a safetensors file"),
    "unet config missing": (lambda f: (f / "unet/config.json").unlink(), "does not load"),
    "unet config is not JSON": (replace("unet/config.json", b"{"), "does not load"),
    "unet of another shape": (other_shape, "conv_in.weight"),
    "unet tensor missing": (without(UNET, "conv_in.weight"), "does not load"),
    "text encoder tensor missing": (without(TEXT, TEXT_BIAS), f"text_encoder has no {TEXT_BIAS}"),
    "tokenizer missing": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer has neither"),
    "scheduler missing": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "does not load"),
}


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_with_the_reason(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(ModelUnavailable, match=reason):
        load_folder(folder)


def test_a_pickle_beside_the_weights_is_never_opened(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    for part in ("unet", "vae"):
        torch.save(Malicious(), folder / part / "diffusion_pytorch_model.bin")
    load_folder(folder)
    (folder / UNET).unlink()
    with pytest.raises(ModelUnavailable, match="has no safetensors file") as caught:
        load_folder(folder)
    assert "pickles" in caught.value.hint
    assert not canary.exists()


def test_variants_beside_the_weights_do_not_count(folder: Path) -> None:
    expected = count_values(folder)
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"cut short")
    check_folder(folder)
    assert count_values(folder) == expected
    load_folder(folder)


@pytest.fixture(scope="module")
def checkpoint(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.single_file(base_folder, tmp_path_factory.mktemp("single") / "checkpoint.safetensors")


def test_a_single_file_is_the_folder_it_was_made_of(base_folder: Path, checkpoint: Path) -> None:
    pipeline = load(builders.source(checkpoint, config=str(base_folder)), checkpoint)
    assert equal(weights(pipeline), weights(builders.pipeline()))
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert count_values(checkpoint) == count_values(base_folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\x80\x04" + content,
        lambda content: b"PK\x03\x04" + content,
    ],
    ids=["cut short", "empty", "pickle", "zip"],
)
def test_a_broken_single_file_is_refused(
    base_folder: Path, checkpoint: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ModelUnavailable, match=r"broken\.safetensors"):
        load(builders.source(file, config=str(base_folder)), file)


def test_a_single_file_of_something_else_is_refused(base_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3)}, file)
    with pytest.raises(ModelUnavailable, match="does not load"):
        load(builders.source(file, config=str(base_folder)), file)


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "multiplies", "unet", "vae"),
    [
        ("auto", False, F32, F32),
        ("auto", True, BF16, F32),
        ("float32", True, F32, F32),
        ("bfloat16", False, BF16, BF16),
    ],
)
def test_without_a_gpu_models_live_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, dtype: str, multiplies: bool, unet: torch.dtype, vae: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies})
    assert choose_placement(builders.settings(use_gpu=False, dtype=dtype)) == Placement("cpu", unet, vae)
