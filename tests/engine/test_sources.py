import socket
from pathlib import Path

import pytest

from api.engine.sources import count_values, find_base, is_downloaded
from api.errors import ModelUnavailable, UnsupportedSize
from tests import builders
from tests.hub import COMMIT, Hub, ask


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="nobody is not there"):
        find_base(builders.source(tmp_path / "nobody"), builders.settings())


def test_a_folder_on_this_disk_is_found(base_folder: Path) -> None:
    assert find_base(builders.source(base_folder), builders.settings()).path == base_folder
    assert is_downloaded(builders.source(base_folder))


def test_the_values_of_a_folder_are_counted_without_loading_it(base_folder: Path) -> None:
    pipeline = builders.pipeline()
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert count_values(base_folder) == sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("levels", "width", "height", "nearest"),
    [
        (1, 300, 256, "304 × 256"),
        (4, 1023, 257, "1024 × 256"),
        (5, 264, 1017, "256 × 1024"),
        (7, 500, 700, "512 × 704"),
    ],
)
def test_a_size_between_steps_is_refused_with_the_nearest(
    tmp_path: Path, levels: int, width: int, height: int, nearest: str
) -> None:
    vae = {
        **builders.VAE,
        "block_out_channels": (4,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    pipeline = builders.pipeline(vae=vae)
    pipeline.save_pretrained(tmp_path)
    found = find_base(builders.source(tmp_path), builders.settings())
    assert found.size_step == max(8, pipeline.vae_scale_factor)
    with pytest.raises(UnsupportedSize, match=f"multiples of {found.size_step}, not {width} × {height}") as caught:
        found.check_size(width, height)
    assert caught.value.hint == f"The nearest size is {nearest}."
    found.check_size(512, 1024)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"block_out_channels": 3}'])
def test_an_autoencoder_of_unknown_size_is_refused(base_folder: Path, tmp_path: Path, content: bytes) -> None:
    folder = builders.copy_of(base_folder, tmp_path / "odd")
    (folder / "vae/config.json").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"odd/vae/config\.json cannot be read"):
        find_base(builders.source(folder), builders.settings())


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_a_lora_given_as_a_whole_model_is_told_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"factors")
    with pytest.raises(ModelUnavailable, match="is a LoRA, not a whole model") as caught:
        find_base(builders.source(tmp_path), builders.settings())
    assert f'"lora": "{tmp_path}"' in caught.value.hint


HUB_SETTINGS = builders.settings(hub_timeout_seconds=5, hf_token="secret")
PINNED, MOVING = f"somebody/model@{COMMIT}", "somebody/model"


@pytest.mark.parametrize("base", [PINNED, MOVING])
def test_a_model_of_the_hub_is_downloaded(stocked: Hub, base: str) -> None:
    source = builders.source(base)
    assert not is_downloaded(source)
    path = find_base(source, HUB_SETTINGS).path
    wanted = {name: data for name, data in stocked.files.items() if data != b"not wanted"}
    assert {name: (path / name).read_bytes() for name in wanted} == wanted
    assert not any(path.rglob("*.bin"))
    assert not any(path.rglob("*.ckpt"))
    assert not any(path.rglob("*.fp16.*"))
    assert stocked.tokens == {"Bearer secret"}
    assert is_downloaded(source)


def test_a_pinned_model_is_asked_for_once(stocked: Hub) -> None:
    source = builders.source(PINNED)
    path = find_base(source, HUB_SETTINGS).path
    stocked.asked.clear()
    assert find_base(source, HUB_SETTINGS).path == path
    assert stocked.asked == []


def test_a_downloaded_model_draws_while_the_hub_is_down(stocked: Hub) -> None:
    source = builders.source(MOVING)
    path = find_base(source, HUB_SETTINGS).path
    stocked.answer = (503, {})
    assert find_base(source, HUB_SETTINGS).path == path


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
        find_base(builders.source(base), HUB_SETTINGS)
    assert hint in caught.value.hint
    assert hub.asked


@pytest.mark.parametrize("base", [PINNED, MOVING])
def test_no_hub_at_all_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str) -> None:
    with socket.socket() as closed:  # bound, so that nobody else takes it, and not listening
        closed.bind(("127.0.0.1", 0))
        ask(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
        with pytest.raises(ModelUnavailable, match="cannot be reached") as caught:
            find_base(builders.source(base), HUB_SETTINGS)
    assert "network" in caught.value.hint


@pytest.fixture
def checkpoint(base_folder: Path, tmp_path: Path) -> Path:
    return builders.single_file(base_folder, tmp_path / "checkpoint.safetensors")


def test_a_single_file_without_a_configuration_takes_that_of_the_hub(stocked: Hub, checkpoint: Path) -> None:
    found = find_base(builders.source(checkpoint), HUB_SETTINGS)
    assert found.path == checkpoint
    assert found.config is not None
    assert (found.config / "unet/config.json").read_bytes() == stocked.files["unet/config.json"]
    assert not any(found.config.rglob("*.safetensors"))


def test_a_single_file_without_a_configuration_needs_the_hub(hub: Hub, checkpoint: Path) -> None:
    hub.answer = (500, {})
    with pytest.raises(ModelUnavailable, match=r"needs a configuration: .* the hub cannot be reached") as caught:
        find_base(builders.source(checkpoint), HUB_SETTINGS)
    assert '"config"' in caught.value.hint
