"""What the service adds to the bare diffusers call, and which precision is faster on this device."""

import io
import json
from collections.abc import Iterator

import torch
from diffusers import StableDiffusionPipeline

from api.config import ROOT, load_settings
from api.model_service import ModelService
from api.schemas import GenerateRequest
from bench.figures import Figure, at_most, paired

DEMO = ROOT / "models" / "demo"
PROMPT = "a woman with long red hair and glasses as a wizard in a forest"
ROUNDS = 4


def figures() -> Iterator[Figure]:
    """Seconds an image at the API's defaults, against the bare pipeline; bfloat16 against float32; 25 steps."""
    request = GenerateRequest(prompt=PROMPT, seed=1)
    full, half = (ModelService(load_settings(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    bare = StableDiffusionPipeline.from_pretrained(DEMO, dtype=torch.float32)
    bare.to(full.engine.device)
    bare.set_progress_bar_config(disable=True)
    rescale = json.loads((DEMO / "scheduler" / "scheduler_config.json").read_text()).get("_guidance_rescale", 0.0)

    def draw_bare() -> None:
        image = bare(
            PROMPT, num_inference_steps=30, generator=torch.Generator().manual_seed(1), guidance_rescale=rescale
        )
        image.images[0].save(io.BytesIO(), format="PNG")

    try:
        bare_seconds, ours, ratio = paired(draw_bare, lambda: full.generate(request), ROUNDS)
        yield Figure("bare diffusers, 512×512, 30 steps", bare_seconds, "s")
        yield Figure("Sitter, 512×512, 30 steps", ours, "s")
        yield at_most("Sitter / bare diffusers", ratio, "ratio", 1.05)
        of_ada = request.model_copy(update={"user_id": "ada"})
        _, _, ratio = paired(lambda: full.generate(request), lambda: full.generate(of_ada), ROUNDS)
        yield Figure("a user's LoRA / the base alone", ratio, "ratio")
        short = request.model_copy(update={"num_inference_steps": 25})
        _, shorter, _ = paired(lambda: full.generate(short), lambda: full.generate(short), 2)
        yield at_most("512×512, 25 steps", shorter, "s", 3.0)
        _, _, ratio = paired(lambda: full.generate(request), lambda: half.generate(request), ROUNDS)
        yield Figure("bfloat16 / float32", ratio, "ratio")
    finally:
        full.close()
        half.close()
