import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from api.config import ModelSource
from api.engine.components import (
    Placement,
    check_folder,
    choose_placement,
    expected_bytes,
    find_folder,
    is_downloaded,
    load_pipeline,
    size_step,
)
from api.engine.weights import TensorPool
from api.errors import ModelUnavailable
from tests import builders

CPU = Placement("cpu", torch.float32)
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT, TEXT_BIAS = "text_encoder/model.safetensors", "final_layer_norm.bias"


def load(source: ModelSource, path: Path, placement: Placement = CPU) -> Any:
    return load_pipeline(source, path, placement, TensorPool())


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
    pipeline = load_folder(base_folder, Placement("cpu", dtype))
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {dtype}
    full = sum(tensor.numel() * 4 for tensor in weights(builders.pipeline()).values())
    assert expected_bytes(base_folder, dtype) == expected_bytes(base_folder, torch.float32) // 2
    assert full - 1000 < expected_bytes(base_folder, torch.float32) <= full


def test_two_models_share_what_is_equal(base_folder: Path, tmp_path: Path) -> None:
    other = builders.save_pipeline(tmp_path / "other", seed=1)
    pool = TensorPool()
    first, second = (load_pipeline(builders.source(path), path, CPU, pool) for path in (base_folder, other))
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
        return equal(weights(load_pipeline(source, path, CPU, pool)), expected)

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
        index(lambda i: i.update(_class_name="StableDiffusionXLPipeline")),
        "broken is a StableDiffusionXLPipeline",
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
    expected = expected_bytes(folder, torch.float32)
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"cut short")
    check_folder(folder)
    assert expected_bytes(folder, torch.float32) == expected
    load_folder(folder)


@pytest.fixture(scope="module")
def checkpoint(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.single_file(base_folder, tmp_path_factory.mktemp("single") / "checkpoint.safetensors")


def test_a_single_file_is_the_folder_it_was_made_of(base_folder: Path, checkpoint: Path) -> None:
    pipeline = load(builders.source(checkpoint, config=str(base_folder)), checkpoint)
    assert equal(weights(pipeline), weights(builders.pipeline()))
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert expected_bytes(checkpoint, torch.float32) == expected_bytes(base_folder, torch.float32)


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


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="nobody is not there"):
        find_folder(builders.source(tmp_path / "nobody"), builders.settings())


def test_a_folder_on_this_disk_is_found(base_folder: Path) -> None:
    assert find_folder(builders.source(base_folder), builders.settings()) == base_folder
    assert is_downloaded(builders.source(base_folder))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_without_a_gpu_models_live_on_the_cpu(dtype: str, expected: torch.dtype) -> None:
    assert choose_placement(builders.settings(use_gpu=False, dtype=dtype)) == Placement("cpu", expected)


@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_sizes_come_in_steps_of_the_autoencoder(blocks: int) -> None:
    vae = {
        **builders.VAE,
        "block_out_channels": (4,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }
    assert size_step(builders.pipeline(vae=vae)) == max(8, 2 ** (blocks - 1))


# --- the hub -------------------------------------------------------------------------------------

URL_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A model hub on this machine: serves one folder, or answers every request alike."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    answer: tuple[int, dict[str, str]] | None = None
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "somebody/model" not in self.path:
            return self._send(404, b"")
        self.hub.asked.append(self.path)
        self.hub.tokens.add(self.headers["Authorization"])
        if self.hub.answer is not None:
            status, headers = self.hub.answer
            if not status:
                self.close_connection = True
                return  # hangs up without a word
            return self._send(status, b"", headers)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.hub.files.items())
            ]
            return self._send(200, json.dumps(tree).encode())
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            return self._send(200, json.dumps({"id": "somebody/model", "sha": COMMIT, "siblings": siblings}).encode())
        name = re.sub(r"^/somebody/model/resolve/[^/]*/", "", path)
        number = list(self.hub.files).index(name)
        self._send(200, self.hub.files[name], {"ETag": f'"{number:040x}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    ask(monkeypatch, hub.url, tmp_path)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    """Points the hub's client at `url`, with an empty cache."""
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + URL_TEMPLATE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


HUB_SETTINGS = builders.settings(hub_timeout_seconds=5, hf_token="secret")
PINNED, MOVING = f"somebody/model@{COMMIT}", "somebody/model"


@pytest.fixture
def stocked(hub: Hub, base_folder: Path) -> Hub:
    """A hub with the tiny base, and beside it what nobody needs."""
    files = [file for file in base_folder.rglob("*") if file.is_file()]
    hub.files = {str(file.relative_to(base_folder)): file.read_bytes() for file in files}
    hub.files |= dict.fromkeys(("README.md", "unet/model.bin", "unet/model.fp16.safetensors", "a.ckpt"), b"not wanted")
    return hub


@pytest.mark.parametrize("base", [PINNED, MOVING])
def test_a_model_of_the_hub_is_downloaded_and_loads(stocked: Hub, base: str) -> None:
    source = builders.source(base)
    assert not is_downloaded(source)
    path = find_folder(source, HUB_SETTINGS)
    assert equal(weights(load(source, path)), weights(builders.pipeline()))
    assert not any(path.rglob("*.bin"))
    assert not any(path.rglob("*.ckpt"))
    assert not any(path.rglob("*.fp16.*"))
    assert stocked.tokens == {"Bearer secret"}
    assert is_downloaded(source)


def test_a_pinned_model_is_asked_for_once(stocked: Hub) -> None:
    source = builders.source(PINNED)
    path = find_folder(source, HUB_SETTINGS)
    stocked.asked.clear()
    assert find_folder(source, HUB_SETTINGS) == path
    assert stocked.asked == []


def test_a_downloaded_model_draws_while_the_hub_is_down(stocked: Hub) -> None:
    source = builders.source(MOVING)
    path = find_folder(source, HUB_SETTINGS)
    stocked.answer = (503, {})
    assert find_folder(source, HUB_SETTINGS) == path


SAYS_NO = {
    "no such model": (
        (404, {"X-Error-Code": "RepoNotFound"}),
        MOVING,
        "the hub has no model somebody/model",
        "HF_TOKEN",
    ),
    "wrong token": ((401, {}), MOVING, "the hub refuses to hand out somebody/model", "HF_TOKEN"),
    "gated": ((403, {"X-Error-Code": "GatedRepo"}), MOVING, "asks for permission", "HF_TOKEN"),
    "no such revision": ((404, {"X-Error-Code": "RevisionNotFound"}), f"{MOVING}@old", "no revision old", "commit"),
    "down": ((500, {}), MOVING, "cannot be reached", "network"),
    "hangs up": ((0, {}), MOVING, "cannot be reached", "network"),
    "something else": ((200, {}), MOVING, "cannot be reached", "network"),
    "forbidden": ((403, {}), MOVING, "the hub refuses to hand out somebody/model", "HF_TOKEN"),
}


@pytest.mark.parametrize(("answer", "base", "reason", "hint"), SAYS_NO.values(), ids=SAYS_NO)
def test_what_the_hub_refuses_is_unavailable(
    hub: Hub, answer: tuple[int, dict[str, str]], base: str, reason: str, hint: str
) -> None:
    hub.answer = answer
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        find_folder(builders.source(base), HUB_SETTINGS)
    assert hint in caught.value.hint
    assert hub.asked


@pytest.mark.parametrize("base", [PINNED, MOVING])
def test_no_hub_at_all_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str) -> None:
    with socket.socket() as closed:  # bound, so that nobody else takes it, and not listening
        closed.bind(("127.0.0.1", 0))
        ask(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
        with pytest.raises(ModelUnavailable, match="cannot be reached") as caught:
            find_folder(builders.source(base), HUB_SETTINGS)
    assert "network" in caught.value.hint


def test_a_single_file_without_a_configuration_needs_the_hub(hub: Hub, checkpoint: Path) -> None:
    hub.answer = (500, {})
    with pytest.raises(ModelUnavailable, match="needs a configuration from the hub") as caught:
        load(builders.source(checkpoint), checkpoint)
    assert '"config"' in caught.value.hint
