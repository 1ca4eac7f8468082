"""Models that cannot be loaded, each in its own way."""

import pickle
import shutil
from pathlib import Path
from typing import Any

UNET = "unet/diffusion_pytorch_model.safetensors"
PICKLES = ("pickle.bin", "pickle.ckpt", "pickle.safetensors", "pickle.SafeTensors")
MARK = "a-pickle-was-run"


class _Trap:
    """A pickle that leaves a file behind when somebody loads it."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self._mark,)


def build(folder: Path) -> None:
    """Writes the broken models beside the whole one, `folder/one`."""
    trap = pickle.dumps(_Trap(folder / MARK))
    for name in PICKLES:
        (folder / name).write_bytes(trap)
    for name in ("truncated", "pickled", "pickled-bin"):
        shutil.copytree(folder / "one", folder / name)
    whole = (folder / "one" / UNET).read_bytes()
    (folder / "truncated" / UNET).write_bytes(whole[: len(whole) // 2])
    (folder / "pickled" / UNET).write_bytes(trap)
    (folder / "pickled-bin" / UNET).rename(folder / "pickled-bin/unet/diffusion_pytorch_model.bin")
    (folder / "pickled-bin/unet/diffusion_pytorch_model.bin").write_bytes(trap)


def users(folder: Path) -> dict[str, Any]:
    """A user for each broken model."""
    folders = ("missing", "truncated", "pickled", "pickled-bin", *PICKLES)
    return {
        **{name: str(folder / name) for name in folders},
        "hub": "nobody/there-is-no-such-model",
        "lora-missing": {"base": str(folder / "one"), "lora": str(folder / "no-lora")},
        "lora-pickle": {"base": str(folder / "one"), "lora": str(folder / "pickle.safetensors")},
    }
