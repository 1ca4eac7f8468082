"""How well the bundled model draws: the figures of `python -m training.evaluate`, held against their bars."""

import json
from collections.abc import Iterator

from api.config import ROOT
from bench.figures import Figure, at_least, at_most

BAR = 0.95
RIGHT = "share right"
SITTERS = ("ada", "bo", "chi")


def figures() -> Iterator[Figure]:
    """What the stored evaluation of exactly these weights found, at 512×512, 30 steps, guidance 7.5."""
    evaluation = json.loads((ROOT / "models" / "evaluation.json").read_text())
    found = {figure["name"]: figure["value"] for figure in evaluation["figures"]}
    yield at_most("models/demo", found["demo_folder"], "MB", 40)
    yield at_least("autoencoder at 512", found["autoencoder_psnr_512"], "dB", 29)
    yield at_least("all attributes named in the prompt", found["base_attributes_right"], RIGHT, BAR)
    yield Figure("the same, prompts shuffled (control)", found["base_shuffled_control"], RIGHT)
    yield Figure("the reader on renders", found["reader_on_renders"], RIGHT)
    for name in sorted(name.removesuffix("_named") for name in found if name.endswith("_named")):
        attribute = name.removeprefix("base_")
        label = f"{attribute} ({found[f'{name}_named']} prompts; shuffled {found[f'shuffled_{attribute}']:.2f})"
        yield at_least(label, found[name], RIGHT, BAR)
    for sitter in SITTERS:
        control = found[f"{sitter}_control_without_adapter_identity_kept"]
        yield at_least(
            f"{sitter}: identity kept (without the model {control:.2f})",
            found[f"{sitter}_identity_kept"],
            RIGHT,
            BAR,
        )
        yield Figure(
            f"{sitter}: every identity attribute at once", found[f"{sitter}_identity_whole"], "share of pictures"
        )
        for part in ("costume", "place"):
            yield at_least(f"{sitter}: {part} obeyed", found[f"{sitter}_{part}"], RIGHT, BAR)
    for name in (name for name in found if name.startswith("size_")):
        size = name.removeprefix("size_").removesuffix("_attributes_right").replace("x", "×")
        yield Figure(f"attributes at {size} (4 prompts)", found[name], RIGHT)
