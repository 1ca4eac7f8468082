"""The text encoder, trained on captions alone before any picture: linear heads on its pooled and its mean state predict
every attribute of the picture that a caption belongs to. Without this, a UNet of this size never learns hair and
costume. For a named person the caption holds only the rare name, so the name's embedding must learn the whole face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.captions import Caption, caption
from training.common import Pace, autocast, descend, save, set_rate
from training.tokenizer import MAX_LENGTH, name_ids
from training.world import ATTRIBUTES, Face, Spec, random_spec

WIDTH = 192
_FACE_TRAITS = len(Face().values())


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, MAX_LENGTH) token ids, padded as the pipeline pads."""
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


class Heads(nn.Module):
    """Linear readers of one text state: logits by attribute, and the continuous face traits."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes = nn.ModuleDict({key: nn.Linear(WIDTH, len(values)) for key, values in ATTRIBUTES.items()})
        self.face = nn.Linear(WIDTH, _FACE_TRAITS)


@dataclass(frozen=True)
class Batch:
    captions: list[Caption]
    labels: dict[str, Tensor]  # -100 where the picture does not show the attribute
    faces: Tensor  # (n, traits)
    named: Tensor  # (n,) 1 where the caption gives a name

    @staticmethod
    def draw(size: int, rng: Random) -> Batch:
        specs = [random_spec(rng) for _ in range(size)]
        captions = [caption(spec, rng) for spec in specs]
        return Batch(
            captions,
            {key: labels(key, specs) for key in ATTRIBUTES},
            torch.tensor([spec.identity.face.values() for spec in specs]),
            torch.tensor([float(words.by_name) for words in captions]),
        )


def labels(attribute: str, specs: list[Spec]) -> Tensor:
    """(n,) class numbers, -100 where the attribute cannot be seen."""
    values = ATTRIBUTES[attribute]
    return torch.tensor([values.index(spec.value(attribute)) if spec.shows(attribute) else -100 for spec in specs])


def pretrain(tokenizer: CLIPTokenizer, steps: int, minutes: float, folder: Path) -> CLIPTextModel:
    torch.manual_seed(2)
    rng, model = Random(9), build(tokenizer)
    heads = (Heads(), Heads())
    trained = [*model.parameters(), *heads[0].parameters(), *heads[1].parameters()]
    optimiser = torch.optim.AdamW(
        [{"params": trained, "base": 1.5e-3}], lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01
    )
    for _ in (pace := Pace("text", steps, minutes)):
        set_rate(optimiser, pace.rate())
        batch = Batch.draw(64, rng)
        with autocast():
            out = model(tokens(tokenizer, [words.text for words in batch.captions]))
        states = (out.pooler_output.float(), out.last_hidden_state.float().mean(1))
        loss = torch.zeros(())
        right: dict[str, float] = {}
        for head, state in zip(heads, states, strict=True):
            for key, truth in batch.labels.items():
                logits = head.attributes[key](state)
                loss = loss + F.cross_entropy(logits, truth)
                seen = truth >= 0
                right[key] = (logits.argmax(1) == truth)[seen].float().mean().item()
            error = (head.face(state) - batch.faces).square().mean(1)
            loss = loss + (error * batch.named).sum() / (batch.named.sum() + 1)
            right["face"] = ((error * batch.named).sum() / (batch.named.sum() + 1e-6)).item()
        descend(loss, optimiser)
        pace.note(50, loss=loss.item(), **right)
        if pace.step % 200 == 0:
            save(folder / "text.pt", model=model)
    save(folder / "text.pt", model=model)
    return model


@torch.no_grad()
def free_token(model: CLIPTextModel, tokenizer: CLIPTokenizer, token: str = "sks") -> None:
    """Make `token` a name that means nobody yet: its embedding becomes the mean of all names'."""
    rows = model.get_input_embeddings().weight
    rows[tokenizer.convert_tokens_to_ids(token + "</w>")] = rows[name_ids(tokenizer)].mean(0)
