"""What a folder is, is read without loading it; what is not a text-to-image pipeline of diffusers itself is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from api.engine.components import Placement, load_stock
from api.engine.sources import FoundBase, check_folder, find_base
from api.engine.text2image import read_index
from api.engine.weights import TensorPool
from api.errors import ModelUnavailable
from tests import builders
from tests.hub import Hub

FamilyFolder = Callable[[str], Path]
EULER = frozenset({"euler"})
ALL = EULER | {"ddim", "euler_a", "dpmpp_2m", "unipc"}


def find(folder: Path) -> FoundBase:
    return find_base(builders.source(folder), builders.settings())


@pytest.mark.parametrize(
    ("family", "kind", "step", "samplers"),
    [
        ("sdxl", "StableDiffusionXLPipeline", 8, ALL),
        ("sd3", "StableDiffusion3Pipeline", 16, EULER),
        ("flux", "FluxPipeline", 16, EULER),
        ("pixart", "PixArtSigmaPipeline", 16, ALL),
        ("qwen", "QwenImagePipeline", 16, EULER),
        ("lcm", "LatentConsistencyModelPipeline", 8, frozenset({"lcm"})),
    ],
)
def test_a_folder_says_what_it_can_be_asked_for(
    family_folder: FamilyFolder, family: str, kind: str, step: int, samplers: frozenset[str]
) -> None:
    found = find(family_folder(family))
    assert (found.pipeline, found.size_step, found.samplers) == (kind, step, samplers)


def test_stable_diffusion_draws_with_every_sampler(base_folder: Path) -> None:
    assert find(base_folder) == FoundBase(str(base_folder), base_folder)


def test_an_autoencoder_that_compresses_deeply_leaves_no_patches(family_folder: FamilyFolder, tmp_path: Path) -> None:
    folder = builders.copy_of(family_folder("sd3"), tmp_path / "sana")
    (folder / "vae/config.json").write_text(json.dumps({"encoder_block_out_channels": [8] * 6}))
    assert find(folder).size_step == 32


def test_flow_matching_of_another_sampler_is_drawn_with_that_alone(family_folder: FamilyFolder, tmp_path: Path) -> None:
    folder = builders.copy_of(family_folder("pixart"), tmp_path / "sana")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    builders.edit_json(folder / "scheduler/scheduler_config.json", lambda config: config.update(flow))
    assert find(folder).samplers == frozenset({"dpmpp_2m"})


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: builders.edit_json(folder / "model_index.json", change)


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: builders.edit_json(folder / name, lambda content: content.update(fields))


def void(_: object) -> None:
    """Drops a result."""


def pickled(component: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in (folder / component).glob("*.safetensors"):
            file.rename(file.with_suffix(".bin"))

    return change


def sharded(*shards: str) -> Callable[[Path], None]:
    """Says that the transformer's weights lie in `shards`, and puts them all into the first."""

    def change(folder: Path) -> None:
        whole = folder / "transformer/diffusion_pytorch_model.safetensors"
        weight_map = {key: shards[place % len(shards)] for place, key in enumerate(load_file(whole))}
        whole.rename(whole.with_name(shards[0]))
        whole.with_name(f"{whole.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def cut(folder: Path) -> None:
    file = folder / "text_encoder_2/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(component: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        [file] = (folder / component).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[min(key for key in tensors if "norm" in key)]
        save_file(tensors, file, {"format": "pt"})

    return change


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_2/tokenizer.json").unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "needs a picture": (edit("model_index.json", _class_name="FluxFillPipeline"), "broken is a FluxFillPipeline"),
    "controls": (edit("model_index.json", _class_name="FluxControlNetPipeline"), "broken is a FluxControlNet"),
    "draws pixels": (edit("model_index.json", _class_name="IFPipeline"), "broken is a IFPipeline"),
    "comes in two": (edit("model_index.json", _class_name="KandinskyV22CombinedPipeline"), "broken is a Kandinsky"),
    "code of its own": (
        edit("model_index.json", _class_name=["pipeline", "FluxPipeline"]),
        r"broken is a \['pipeline'",
    ),
    "component's code": (
        index(lambda i: i.update(transformer=["flux_code", "Model"])),
        "code from flux_code, which is",
    ),
    "odd component": (index(lambda i: i.update(transformer=["diffusers", 5])), "cannot be read: its transformer is"),
    "a pipeline inside": (
        index(lambda i: i.update(text_encoder_2=["diffusers", "DiffusionPipeline"])),
        "diffusers has no component DiffusionPipeline",
    ),
    "a function": (index(lambda i: i.update(tokenizer_2=["transformers", "pipeline"])), "has no component pipeline"),
    "no such class": (index(lambda i: i.update(transformer=["diffusers", "Nothing"])), "has no component Nothing"),
    "no transformer": (index(lambda i: i.pop("transformer")), "broken has no transformer"),
    "no scheduler": (index(lambda i: i.update(scheduler=[None, None])), "broken has no scheduler"),
    "remote code": (edit("text_encoder_2/config.json", auto_map={"AutoModel": "code.Model"}), "wants code or weights"),
    "tokenizer's code": (edit("tokenizer_2/tokenizer_config.json", auto_map={}), "tokenizer_2 wants code or weights"),
    "weights elsewhere": (
        lambda folder: void((folder / "text_encoder/adapter_config.json").write_text("{}")),
        "text_encoder wants code or weights from elsewhere",
    ),
    "pickled transformer": (pickled("transformer"), "broken/transformer has no safetensors file"),
    "pickled text encoder": (pickled("text_encoder_2"), "broken/text_encoder_2 has no safetensors file"),
    "a shard missing": (sharded("1.safetensors", "2.safetensors"), r"broken/transformer has no 2\.safetensors"),
    "a pickled shard": (sharded("1.safetensors", "2.bin"), r"broken/transformer has no 2\.bin"),
    "a shard elsewhere": (sharded("1.safetensors", "../2.safetensors"), r"has no \.\./2\.safetensors"),
    "cut short": (cut, r"model\.safetensors was cut short"),
    "no tokenizer": (no_tokenizer, "tokenizer_2 has neither"),
    "tensor of transformer": (without("transformer"), "broken/transformer has no .*norm"),
    "tensor of text encoder": (without("text_encoder_2"), "broken/text_encoder_2 has no .*norm"),
    "tensor of decoder": (without("vae"), "broken/vae has no .*norm"),
    "another shape": (edit("transformer/config.json", num_attention_heads=3), "does not load"),
    "scheduler unread": (
        lambda folder: void((folder / "scheduler/scheduler_config.json").write_text("{")),
        "does not load|cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_with_the_reason(
    family_folder: FamilyFolder, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = builders.copy_of(family_folder("flux"), tmp_path / "broken")
    damage(folder)
    with pytest.raises(ModelUnavailable, match=reason):
        load_stock(FoundBase("broken", folder), Placement("cpu", torch.float32, torch.float32), TensorPool())


def test_a_text_encoder_may_be_left_out(family_folder: FamilyFolder, tmp_path: Path) -> None:
    """Stable Diffusion 3 without T5, as many have it."""
    folder = builders.copy_of(family_folder("sd3"), tmp_path / "small")
    builders.edit_json(
        folder / "model_index.json", lambda i: i.update(text_encoder_3=[None, None], tokenizer_3=[None, None])
    )
    assert read_index(folder).absent == ["text_encoder_3", "tokenizer_3"]
    pipeline = load_stock(FoundBase("small", folder), Placement("cpu", torch.float32, torch.float32), TensorPool())
    assert pipeline.text_encoder_3 is None


def test_shards_are_loaded(family_folder: FamilyFolder, tmp_path: Path) -> None:
    folder = builders.copy_of(family_folder("flux"), tmp_path / "sharded")
    whole = folder / "transformer/diffusion_pytorch_model.safetensors"
    expected = load_file(whole)
    transformer = FluxTransformer2DModel.from_pretrained(whole.parent)
    whole.unlink()
    transformer.save_pretrained(whole.parent, max_shard_size="100KB")
    assert not whole.exists()
    pipeline = load_stock(FoundBase("sharded", folder), Placement("cpu", torch.float32, torch.float32), TensorPool())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.transformer.state_dict().items())


def test_of_the_hub_comes_what_is_loaded(hub: Hub, family_folder: FamilyFolder) -> None:
    folder = family_folder("sd3")
    files = [file for file in folder.rglob("*") if file.is_file()]
    hub.files = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    unwanted = (
        "sd3.5_large.safetensors",  # the same once more, for other programs
        "text_encoders/t5xxl_fp16.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.bin",
    )
    hub.files |= dict.fromkeys(unwanted, b"not wanted")
    found = find_base(builders.source("somebody/model"), builders.settings(hub_timeout_seconds=5))
    assert found.pipeline == "StableDiffusion3Pipeline"
    assert {str(file.relative_to(found.path)) for file in found.path.rglob("*") if file.is_file()} == {
        str(file.relative_to(folder)) for file in files
    }
    check_folder(found.path)


def test_of_a_model_that_is_refused_comes_no_weight(hub: Hub, family_folder: FamilyFolder) -> None:
    folder = family_folder("flux")
    files = [file for file in folder.rglob("*") if file.is_file()]
    hub.files = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    hub.files["model_index.json"] = json.dumps({"_class_name": "FluxFillPipeline"}).encode()
    with pytest.raises(ModelUnavailable, match="is a FluxFillPipeline") as caught:
        find_base(builders.source("somebody/model"), builders.settings(hub_timeout_seconds=5))
    assert "FluxPipeline" in caught.value.hint
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
