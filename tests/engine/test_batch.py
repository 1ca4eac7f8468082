"""Many requests in one batch: each is drawn as it is alone, whoever joins, leaves or fails meanwhile."""

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from api.engine import sampler
from api.engine.adapters import Adapter, applied, load_adapter
from api.engine.batch import Batch, Model, OnCall, Task
from api.engine.sampler import SAMPLERS
from api.engine.slots import Slots
from api.errors import BadPicture, Cancelled, OutOfMemory, ShuttingDown
from api.schemas import GenerateRequest
from tests import builders

PATIENCE = 120.0


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    base = builders.pipeline()
    base.set_progress_bar_config(disable=True)
    for module in (base.unet, base.text_encoder, base.vae):
        module.eval().requires_grad_(False)
    return base


@pytest.fixture(scope="module")
def adapters(base: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Users whose models differ strongly, of several ranks."""
    made = {}
    for number, rank in enumerate((2, 4, 16, 64)):
        factors = builders.factors(base.unet, builders.UNET_LAYERS, rank=rank, seed=number)
        file = tmp_path_factory.mktemp("adapters") / f"{number}.safetensors"
        made[f"user{number}"] = load_adapter(builders.diffusers_lora(file, factors, {}), base, 1.0 / rank)
    return made


@dataclass
class Bench:
    """A batch over one model, and what its tasks are alone."""

    base: StableDiffusionPipeline
    adapters: dict[str, Adapter]
    model: Model
    batch: Batch

    def task(self, user: str, request: GenerateRequest, on_call: OnCall = lambda done, latents: None) -> Task:
        guided = request.guidance_scale > 1
        with torch.inference_mode():
            positive, negative = self.base.encode_prompt(
                request.prompt, "cpu", request.num_images, guided, request.negative_prompt
            )
        config = {**self.base.scheduler.config, "_class_name": "DDIMScheduler"}
        schedule = sampler.schedule(request.scheduler, config, request.num_inference_steps)
        generators = self.generators(request)
        shape = (1, 4, request.height // 8, request.width // 8)
        noise = torch.cat([torch.randn(shape, generator=one) for one in generators])
        adapter = self.adapters.get(user)
        return Task(
            self.model,
            (user, adapter) if adapter else None,
            user,
            schedule,
            sampler.start(noise, schedule),
            torch.cat([negative, positive]) if guided else positive,
            request.guidance_scale,
            0.0,
            generators,
            on_call,
        )

    def alone(self, user: str, request: GenerateRequest) -> Tensor:
        """The latents of the stock call, with the user's weights merged."""
        kind = SAMPLERS[request.scheduler] if request.scheduler else type(self.base.scheduler)
        own = StableDiffusionPipeline(
            **{**self.base.components, "scheduler": kind.from_config(self.base.scheduler.config)},
            requires_safety_checker=False,
        )
        own.set_progress_bar_config(disable=True)
        with torch.inference_mode(), applied(self.adapters.get(user), self.base):
            latents: Tensor = own(
                request.prompt,
                negative_prompt=request.negative_prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                num_images_per_prompt=request.num_images,
                generator=self.generators(request),
                output_type="latent",
            ).images
        return latents

    def generators(self, request: GenerateRequest) -> list[torch.Generator]:
        assert request.seed is not None
        return [torch.Generator().manual_seed(request.seed + index) for index in range(request.num_images)]


@pytest.fixture
def bench(base: StableDiffusionPipeline, adapters: dict[str, Adapter]) -> Iterator[Bench]:
    slots = Slots(base.unet, 3)
    batch = Batch(most_rows=6)
    yield Bench(base, adapters, Model(base.unet, slots), batch)
    batch.close()
    slots.remove()


def some_request(chance: random.Random) -> tuple[str, GenerateRequest]:
    user = chance.choice(["nobody", *[f"user{number}" for number in range(4)]])
    fields: dict[str, Any] = {
        "prompt": chance.choice(["sks person as a knight", "a red house by the sea", "sks person, smiling"]),
        "negative_prompt": chance.choice([None, "rain"]),
        "num_inference_steps": chance.randint(1, 9),
        "guidance_scale": chance.choice([1.0, 3.0, 7.5]),
        "num_images": chance.choice([1, 1, 1, 2, 4]),
        "width": chance.choice([256, 256, 320]),
        "scheduler": chance.choice([None, "ddim", "euler", "euler_a", "dpmpp_2m", "unipc"]),
        "seed": chance.randrange(1000),
    }
    return user, builders.request(user_id=user, **fields)


@pytest.mark.parametrize("seed", range(3))
def test_each_is_drawn_as_it_is_alone(bench: Bench, seed: int) -> None:
    """More users than slots, more rows than fit, every sampler, two sizes, joining whenever a place is free."""
    wanted = [some_request(random.Random(100 * seed + number)) for number in range(15)]
    tasks = [bench.task(user, request) for user, request in wanted]
    with ThreadPoolExecutor(10) as crowd:
        drawn = list(crowd.map(bench.batch.draw, tasks))
    for (user, request), latents in zip(wanted, drawn, strict=True):
        alone = bench.alone(user, request)
        assert (latents - alone).abs().max() <= 1e-4 * alone.abs().max(), (user, request)


def test_a_user_never_gets_anothers_model(bench: Bench) -> None:
    """The same prompt and seed for everybody: only whose model it is differs, and that by far."""
    request = builders.request(num_inference_steps=3, guidance_scale=1.0, scheduler="ddim")
    users = ["nobody", *bench.adapters]
    alone = {user: bench.alone(user, request) for user in users}
    for one in users:
        for other in users:
            assert one == other or (alone[one] - alone[other]).abs().max() > 0.1
    crowd = users * 8
    random.Random(1).shuffle(crowd)
    with ThreadPoolExecutor(12) as threads:
        drawn = list(threads.map(lambda user: bench.batch.draw(bench.task(user, request)), crowd))
    for user, latents in zip(crowd, drawn, strict=True):
        nearest = min(users, key=lambda known: float((latents - alone[known]).abs().max()))
        assert nearest == user


def test_who_cancels_leaves_and_nobody_notices(bench: Bench) -> None:
    request = builders.request(num_inference_steps=8)
    calls: list[int] = []

    def stop_at_three(done: int, latents: Tensor) -> None:
        calls.append(done)
        if done == 3:
            raise Cancelled("it was cancelled")

    with ThreadPoolExecutor(3) as crowd:
        others = [crowd.submit(bench.batch.draw, bench.task(user, request)) for user in ("user0", "user1")]
        with pytest.raises(Cancelled):
            bench.batch.draw(bench.task("user2", request, stop_at_three))
        drawn = [other.result(PATIENCE) for other in others]
    assert calls == [1, 2, 3]
    for user, latents in zip(("user0", "user1"), drawn, strict=True):
        alone = bench.alone(user, request)
        assert (latents - alone).abs().max() <= 1e-4 * alone.abs().max()


def test_latents_that_are_not_finite_fail_alone(bench: Bench) -> None:
    request = builders.request(num_inference_steps=4)
    broken = bench.task("user0", request)
    broken.text[0] = float("nan")
    with ThreadPoolExecutor(2) as crowd:
        other = crowd.submit(bench.batch.draw, bench.task("user1", request))
        with pytest.raises(BadPicture):
            bench.batch.draw(broken)
        latents = other.result(PATIENCE)
    alone = bench.alone("user1", request)
    assert (latents - alone).abs().max() <= 1e-4 * alone.abs().max()


class Small(nn.Module):
    """A UNet on a device whose memory suffices for so many rows."""

    def __init__(self, unet: nn.Module, most: int) -> None:
        super().__init__()
        self._unet, self._most = unet, most
        self.dtype = torch.float32

    def forward(self, rows: Tensor, *args: Any, **options: Any) -> Any:
        if len(rows) > self._most:
            raise OutOfMemory("no room")
        return self._unet(rows, *args, **options)


def test_memory_for_one_is_enough_for_all_but_who_needs_more(bench: Bench) -> None:
    request = builders.request(num_inference_steps=3)
    small = Model(Small(bench.base.unet, 2), bench.model.slots)
    tasks = [bench.task(user, request) for user in ("user0", "user1", "nobody")]
    tasks.append(bench.task("user2", builders.request(num_inference_steps=3, num_images=3)))
    for task in tasks:
        task.model = small
    with ThreadPoolExecutor(4) as crowd:
        *futures, too_large = [crowd.submit(bench.batch.draw, task) for task in tasks]
        drawn = [future.result(PATIENCE) for future in futures]
        with pytest.raises(OutOfMemory):
            too_large.result(PATIENCE)
    for user, latents in zip(("user0", "user1", "nobody"), drawn, strict=True):
        alone = bench.alone(user, request)
        assert (latents - alone).abs().max() <= 1e-4 * alone.abs().max()


def test_who_comes_later_does_not_wait_for_a_crowd(bench: Bench) -> None:
    """One user with twenty requests, and one with one: the device is shared by users, not by requests."""
    steps = Counter[str]()
    ends: dict[str, int] = {}

    def counted(user: str) -> OnCall:
        def on_call(done: int, latents: Tensor) -> None:
            steps[user] += 1
            if user == "bo" and done == 6:
                ends["bo"] = steps["ada"]

        return on_call

    request = builders.request(num_inference_steps=6)
    crowd = [bench.task("ada", request, counted("ada")) for _ in range(20)]
    late = bench.task("bo", request, counted("bo"))
    with ThreadPoolExecutor(21) as threads:
        waiting = [threads.submit(bench.batch.draw, task) for task in crowd]
        bench.batch.draw(late)
        for future in waiting:
            future.result(PATIENCE)
    assert steps == {"ada": 120, "bo": 6}
    assert ends["bo"] <= 90  # four requests fit at once: bo's six steps meet some twenty of ada's, wherever it begins


def test_closing_ends_what_is_drawn_and_refuses_the_rest(bench: Bench) -> None:
    started = bench.task("ada", builders.request(num_inference_steps=100))
    with ThreadPoolExecutor(1) as crowd:
        waiting = crowd.submit(bench.batch.draw, started)
        while not started.done:
            assert not waiting.done()
        bench.batch.close()
        with pytest.raises(ShuttingDown):
            waiting.result(PATIENCE)
    with pytest.raises(ShuttingDown):
        bench.batch.draw(bench.task("ada", builders.request()))
