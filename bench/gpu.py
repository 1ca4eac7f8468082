"""`python -m bench.gpu [--small]`: the bars that need a GPU; writes docs/benchmarks-gpu.md with the card's name.

Random weights of Stable Diffusion 1.5's size, 512 × 512 pixels, 30 steps with guidance, LoRAs of rank 16. Everything
that can be is compiled: the service, and arm C. `--small` tries it out on whatever machine, and writes nothing.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from api.config import ROOT
from api.schemas import GenerateRequest
from bench import gpu_train, switching, ways
from bench.arms import Arm, OneThread, Sitter, user_models
from bench.figures import Figure, at_least, at_most, page, quiet
from bench.loras import write_loras
from bench.random_model import write_model
from bench.ways import DEVICE, Given, load_base
from bench.workload import burst

USERS = tuple(f"user{number}" for number in range(8))
RANK = 16
ROUNDS = 3
ROWS = 16  # eight pictures with guidance
SINGLES = 5
SWITCHES = 10  # of checkpoints
SWITCHED = tuple(f"switched{number}" for number in range(20))  # more than there are slots: each is copied anew
OURS, HOTSWAP, RELOAD = "G Sitter", "C hotswap", "B load and unload"


def figures(small: bool = False) -> Iterator[Figure]:
    """Yields seconds a warm picture, pictures a second of eight users, what a switch of models costs, and a training.

    Args:
        small: a model of a fiftieth, two steps of 256 × 256 pixels, nothing compiled: whether all of it runs.
    """
    shrink, steps, side, train_steps = (5, 2, 256, 4) if small else (1, 30, 512, 400)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [write_model(folder / f"model{seed}", seed, shrink) for seed in range(2)]
        yield from _drawing(folder, models, steps, side, compiled=not small)
        yield from gpu_train.figures(models[0], folder, train_steps, side)


def _drawing(folder: Path, models: Sequence[Path], steps: int, side: int, compiled: bool) -> Iterator[Figure]:
    model = models[0]
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    unet = load_base(model, dtype).unet
    loras = write_loras(folder / "loras", unet, (*USERS, *SWITCHED), (RANK,), seed=1)
    given = Given(model, loras, 60_000_000_000, highest_rank=RANK, dtype=dtype, compiled=compiled)
    with ExitStack() as closing:
        arms: dict[str, Arm] = {
            OURS: Sitter(
                given,
                batch_rows=ROWS,
                user_models=user_models(given) | {each.name: {"base": str(each)} for each in models},
            ),
            HOTSWAP: OneThread(ways.HotSwap, given),
            RELOAD: OneThread(ways.LoadEach, given),
        }
        for arm in arms.values():
            closing.callback(arm.close)
            arm.hold(USERS)
        yield from _speeds(arms, steps, side)
        ours = arms[OURS]
        assert isinstance(ours, Sitter)
        ours.hold(SWITCHED)
        yield at_most("gpu_switch_ms", switching.from_memory(ours, SWITCHED) * 1000, "ms", 5)
        yield at_most("gpu_checkpoint_switch_ms", _checkpoint_switch(ours) * 1000, "ms", 2)


def _requests(steps: int, side: int, first_seed: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            prompt="photo of sks person as a wizard in a forest",
            user_id=user,
            num_inference_steps=steps,
            width=side,
            height=side,
            seed=first_seed + number,
        )
        for number, user in enumerate(USERS)
    ]


def _speeds(arms: dict[str, Arm], steps: int, side: int) -> Iterator[Figure]:
    for arm in arms.values():  # compiles what is left to be, and fills caches
        burst(arm, _requests(steps, side, 0))
    singles = [burst(arms[OURS], _requests(steps, side, seed)[:1]).seconds for seed in range(SINGLES)]
    yield at_most("gpu_warm_image_s", statistics.median(singles), "s", 0.25)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            rates[name].append(burst(arms[name], _requests(steps, side, 100 * number)).images_per_second)
    for name, each in rates.items():
        yield Figure(f"{name}: images a second, 8 users", statistics.median(each), "1/s")
    yield at_least("gpu_mixed8_images_per_s", statistics.median(rates[OURS]), "1/s", 6)
    for name, rival, least in (("hotswap", HOTSWAP, 1.5), ("reload", RELOAD, 5)):
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates[OURS], rates[rival], strict=True))
        yield at_least(f"gpu_mixed8_vs_{name}", ratio, "ratio", least)


def _checkpoint_switch(arm: Sitter) -> float:
    """Returns the seconds that a first step takes longer when another checkpoint in memory was drawn before it."""
    one, other = "model0", "model1"
    same, switched = list[float](), list[float]()
    for _ in range(SWITCHES):
        for before, user, spent in ((one, one, same), (other, one, switched)):
            switching.first_step(arm, before)
            spent.append(switching.first_step(arm, user))
    return statistics.median(switched) - statistics.median(same)


def main(small: bool) -> None:
    """Prints the figures, and keeps those of a GPU."""
    quiet()
    made = []
    for figure in figures(small):
        print(figure, flush=True)
        made.append(figure)
    if DEVICE == "cuda" and not small:
        card = torch.cuda.get_device_name()
        page({f"Stable Diffusion 1.5 on one {card}": made}, ROOT / "docs" / "benchmarks-gpu.md", "make bench-gpu")


if __name__ == "__main__":
    main("--small" in sys.argv[1:])
