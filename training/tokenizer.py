"""A byte-level BPE of about 1,500 tokens for CLIPTokenizer, learned from the captions. `sks` and every rare name are
one token each; any other text still splits into known pieces."""

from __future__ import annotations

import json
from random import Random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.captions import caption
from training.world import named_people, random_spec

MAX_LENGTH = 56
_VOCABULARY = 1600
_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
# Words that users and their negative prompts bring along.
_EXTRA = """
sks ohwx zwx person man woman people photo photograph picture image portrait painting drawing illustration cartoon
avatar style of the a an in on at with and or wearing as by for to from is his her their no not without old young
handsome beautiful cute friendly confident professional corporate headshot close up face looking camera standing
sitting holding reading book library cozy warm cold hair eyes skin dark light pale hat helmet crown suit tie armor
space night day snow park garden street lighting cinematic dramatic soft natural high quality detailed sharp focus
realistic masterpiece best low blurry bad ugly deformed distorted worst text watermark expression background plain
modern casual shirt linkedin profile anime watercolor oil fantasy magic epic color colorful extra fingers hands
cropped noise jpeg artifacts
"""


def build() -> CLIPTokenizer:
    rng = Random(5)
    words = [*_EXTRA.split(), *named_people()]
    corpus = [caption(random_spec(rng), rng).text for _ in range(12_000)] + words * 60
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
            limit_alphabet=300,
        ),
    )
    merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def name_ids(tokenizer: CLIPTokenizer) -> list[int]:
    """The token of every named person."""
    ids: list[int] = tokenizer.convert_tokens_to_ids([name + "</w>" for name in named_people()])
    return ids
