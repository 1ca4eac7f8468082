"""Thousands of requests, and models that come and go with every one, leave memory as it was."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from api.config import ModelSource
from api.model_service import ModelService
from tests import builders
from tests.chaos.stage import SCALE

REQUESTS = 200 if SCALE == 1 else 500 * SCALE
USERS = 40  # more than slots, and than the cache has room for
HELD = 10  # adapters that fit into it
THREADS = 8
QUARTERS = 4
GROWTH = 24_000_000  # bytes: of allocators that keep what they were given, whatever the number of requests


@pytest.fixture
def service(base_folder: Path, tmp_path: Path) -> ModelService:
    unet = builders.pipeline().unet
    sources: dict[str, ModelSource] = {"default": builders.source(base_folder)}
    for number in range(USERS):
        factors = builders.factors(unet, builders.UNET_LAYERS, rank=4 << number % 3, seed=number)
        file = builders.diffusers_lora(tmp_path / f"{number}.safetensors", factors, {})
        sources[f"user{number}"] = builders.source(base_folder, lora=str(file))
    room = sum(file.stat().st_size for file in base_folder.rglob("*.safetensors")) + HELD * file.stat().st_size
    return ModelService(builders.settings(sources, host_cache_gb=room / 1e9, batch_rows=8))


def test_memory_stays_flat(service: ModelService) -> None:
    chance = random.Random(5)
    process = psutil.Process()

    def draw(user: str) -> bool:
        return service.generate(builders.request(user_id=user, num_inference_steps=1)).cache_hit

    taken, misses = list[int](), 0
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in range(QUARTERS + 1):  # the first fills pools and caches
                users = [f"user{chance.randrange(USERS)}" for _ in range(REQUESTS // QUARTERS)]
                misses += list(pool.map(draw, users)).count(False)
                gc.collect()
                taken.append(process.memory_info().rss)
        assert misses > REQUESTS / 4  # had to be read anew
        assert service.cache.used() <= service.cache.budgets["cpu"]
    finally:
        service.close()
    print(f"{REQUESTS} requests, {misses} models read: {[round(rss / 1e6, 1) for rss in taken]} MB")
    assert taken[-1] - taken[0] < GROWTH, taken
