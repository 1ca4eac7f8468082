"""Tiny models that see: a YOLOS that really finds faces, drawn ones, and a CLIP with random weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPModel, YolosConfig, YolosForObjectDetection

from tests import builders

WIDTH, HEIGHT = 64, 32  # pixels of what the detector is given
MOST_FACES = 3
STEPS, BATCH = 250, 64
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# As the hub's models say it, in small: hustvl/yolos-tiny, openai/clip-vit-base-patch32.
FOR_YOLOS = {"feature_extractor_type": "YolosFeatureExtractor", "do_resize": True, "do_normalize": True, **HALF}
FOR_CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "do_normalize": True, **HALF}


def scene(faces: int, seed: int, width: int = 512, height: int = 256) -> Image.Image:
    """A wall of dull blocks, another one for each seed, and so many faces before it."""
    return _drawn(faces, np.random.default_rng(seed), width, height)[0]


def _drawn(
    faces: int, chance: np.random.Generator, width: int, height: int
) -> tuple[Image.Image, Sequence[Sequence[float]]]:
    """A scene, and the boxes of its faces from the left: the middle, the width and the height, in parts of its own."""
    wall = chance.integers(0, 110, (8, 8, 3), np.uint8)
    image = Image.fromarray(wall).resize((width, height), Image.Resampling.NEAREST)
    pen, boxes = ImageDraw.Draw(image), []
    for number in range(faces):
        across, down = 0.2 + chance.uniform(0, 0.03), 0.6 + chance.uniform(0, 0.1)
        x, y = (number + 0.5 + chance.uniform(-0.1, 0.1)) / faces, chance.uniform(0.4, 0.6)
        skin = tuple(int(level) for level in np.array([240, 190, 150]) - chance.integers(0, 40))

        def oval(colour: Any, dx: float, dy: float, wide: float, tall: float, box: Any = (x, y, across, down)) -> None:
            left, top, w, h = box
            middle, level = left + dx * w, top + dy * h
            edges = (middle - wide * w, level - tall * h, middle + wide * w, level + tall * h)
            pen.ellipse([edge * (width if at % 2 == 0 else height) for at, edge in enumerate(edges)], fill=colour)

        oval(skin, 0, 0, 0.5, 0.5)
        for side in (-0.2, 0.2):
            oval((30, 20, 20), side, -0.1, 0.08, 0.06)
        oval((170, 40, 50), 0, 0.22, 0.2, 0.05)
        boxes.append((x, y, across, down))
    return image, boxes


def save_detector(folder: Path, label: str = "face") -> Path:
    """Trains a YOLOS within seconds; its token n stands for the n-th face from the left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = YolosConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=(HEIGHT, WIDTH),
            patch_size=8,
            num_detection_tokens=MOST_FACES + 1,
            id2label={0: label},
            label2id={label: 0},
        )
        model = YolosForObjectDetection(config)
        chance = np.random.default_rng(0)
        counts = chance.integers(0, MOST_FACES + 1, 1500)
        drawn = [_drawn(int(count), chance, WIDTH, HEIGHT) for count in counts]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image, _ in drawn]).permute(0, 3, 1, 2) / 127.5 - 1
        tokens = torch.arange(MOST_FACES + 1)
        there = tokens[None] < torch.from_numpy(counts)[:, None]
        boxes = torch.zeros(len(drawn), len(tokens), 4)
        for number, (_, found) in enumerate(drawn):
            boxes[number, : len(found)] = torch.tensor(found).reshape(-1, 4)
        optimiser = torch.optim.AdamW(model.parameters())
        for step in range(STEPS):
            optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
            some = torch.randint(len(drawn), (BATCH,))
            out = model(pixel_values=pixels[some])
            wrong = F.cross_entropy(out.logits.flatten(0, 1), (~there[some]).long().flatten())
            off = ((out.pred_boxes - boxes[some]).abs().sum(-1) * there[some]).mean()
            optimiser.zero_grad()
            (wrong + off).backward()
            optimiser.step()
    model.save_pretrained(folder)
    size = {"height": HEIGHT, "width": WIDTH}
    (folder / "preprocessor_config.json").write_text(json.dumps({**FOR_YOLOS, "size": size}))
    return folder


def save_encoder(folder: Path) -> Path:
    """A CLIP that knows nothing, but sees what is the same, and what is alike."""
    words = builders.read_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": words.model_max_length},
            vision_config={**small, "image_size": 64, "patch_size": 16},
            projection_dim=32,
        )
        model = CLIPModel(config)
    for parameter in model.parameters():  # at the usual scale all is nearly the same to it
        parameter.data.mul_(5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**FOR_CLIP, "size": 64, "crop_size": 64}))
    return folder
