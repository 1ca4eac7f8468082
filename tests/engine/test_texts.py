"""Embeddings are those of diffusers' own call on merged weights, read once for each text and each adapter."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from api.engine.adapters import Adapter, LayerDelta
from api.engine.texts import Texts
from tests import builders

PROMPT = "sks person as a knight"


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture
def texts(base: StableDiffusionPipeline) -> Texts:
    return Texts(base)


@pytest.fixture
def read(texts: Texts) -> Iterator[list[int]]:
    """The texts that the encoder was given, in order."""
    seen: list[int] = []
    module = texts._slots.module
    handle = module.register_forward_pre_hook(lambda *_: seen.append(len(seen)))
    yield seen
    handle.remove()


def adapter(base: StableDiffusionPipeline, rank: int = 2, seed: int = 5, component: str = "text_encoder") -> Adapter:
    layers = builders.TEXT_LAYERS if component == "text_encoder" else builders.UNET_LAYERS
    pairs = builders.factors(getattr(base, component), layers, rank, seed)
    return Adapter(tuple(LayerDelta(component, name, pair["A"], pair["B"], rank**-0.5) for name, pair in pairs.items()))


@torch.inference_mode()
def theirs(base: StableDiffusionPipeline, text: str, adapter: Adapter | None) -> Tensor:
    embedding: Tensor = builders.with_merged(base, adapter).encode_prompt(text, "cpu", 1, False)[0]
    return embedding


def is_close(one: Tensor, other: Tensor) -> bool:
    return bool(one.shape == other.shape and (one - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.parametrize("text", [PROMPT, "", "word " * 400, "Ünïcödé 画"], ids=["some", "none", "long", "odd"])
@pytest.mark.parametrize("rank", [None, 1, 2, 64, 128, 129])
def test_the_embedding_is_that_of_the_stock_call(
    base: StableDiffusionPipeline, texts: Texts, rank: int | None, text: str
) -> None:
    ada = None if rank is None else adapter(base, rank)
    embedding, expected = texts.encode(text, ada), theirs(base, text, ada)
    assert is_close(embedding, expected)
    assert rank is not None or torch.equal(embedding, expected)
    assert (rank is None) == is_close(embedding, theirs(base, text, None))


def test_a_text_is_read_once_for_each_adapter_that_changes_the_encoder(
    base: StableDiffusionPipeline, texts: Texts, read: list[int]
) -> None:
    ada, bo = adapter(base), adapter(base, seed=6)
    only_unet = adapter(base, component="unet")
    for _ in range(3):
        for each in (None, ada, bo, only_unet):
            assert torch.equal(texts.encode(PROMPT, each), texts.encode(PROMPT, each))
    assert len(read) == 3
    assert texts.encode(PROMPT, only_unet) is texts.encode(PROMPT, None)
    assert not is_close(texts.encode(PROMPT, ada), texts.encode(PROMPT, bo))
    texts.encode(PROMPT + ".", ada)
    assert len(read) == 4


def test_dropping_an_adapter_forgets_its_texts_and_no_others(
    base: StableDiffusionPipeline, texts: Texts, read: list[int]
) -> None:
    people = [None, adapter(base), adapter(base, seed=6), adapter(base, rank=129)]
    before = [texts.encode(text, person) for person in people for text in (PROMPT, "another")]
    del read[:]
    for gone in people[1:]:
        assert gone is not None
        texts.drop(gone)
        assert gone.key not in texts._slots.warm()
        assert gone.key not in {key for key, _ in texts._known}
    texts.drop(adapter(base))  # which nobody knows
    after = [texts.encode(text, person) for person in people for text in (PROMPT, "another")]
    assert len(read) == 6, "nobody's are still known"
    assert all(is_close(one, other) for one, other in zip(before, after, strict=True))
    assert not any(one is other for one, other in zip(before[2:], after[2:], strict=True))


def test_no_prompt_stays_in_memory_for_having_been_read(texts: Texts) -> None:
    texts.encode("zebrafinch", None)
    [(key, digest)] = texts._known
    assert key is None
    assert b"zebrafinch" not in digest
    assert len(digest) == 32


def test_what_was_not_asked_for_longest_leaves_first(
    texts: Texts, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.texts.KEPT_BYTES", 3 * texts.encode("one", None).nbytes)
    for text in ("two", "three", "one", "four"):
        texts.encode(text, None)
    del read[:]
    for text in ("one", "three", "four"):
        texts.encode(text, None)
    assert read == []
    texts.encode("two", None)
    assert len(read) == 1
    assert len(texts._known) == 3


def test_a_text_larger_than_all_that_is_kept_is_read_nevertheless(
    base: StableDiffusionPipeline, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.texts.KEPT_BYTES", 1)
    assert torch.equal(texts.encode(PROMPT, None), theirs(base, PROMPT, None))
    assert len(texts._known) == 0


def test_many_threads_with_more_adapters_than_slots_read_their_own(base: StableDiffusionPipeline, texts: Texts) -> None:
    people = [None, *(adapter(base, rank, seed) for seed, rank in enumerate((1, 2, 4, 9, 33, 64, 129)))]
    words = [PROMPT, "a red house", ""]
    expected = [[theirs(base, text, person) for text in words] for person in people]

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(40):
            who, what = chance.randrange(len(people)), chance.randrange(len(words))
            assert is_close(texts.encode(words[what], people[who]), expected[who][what])
            if (person := people[chance.randrange(len(people))]) and chance.random() < 0.2:
                texts.drop(person)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, number) for number in range(8)]:
            done.result()
    assert texts._slots._users.total() == 0


def test_the_encoder_of_the_base_stays_as_it_is(base: StableDiffusionPipeline, texts: Texts) -> None:
    modules = dict(base.text_encoder.named_modules())
    parameters = dict(base.text_encoder.named_parameters())
    values = {name: value.clone() for name, value in parameters.items()}
    plain = theirs(base, PROMPT, None)
    for rank in (2, 129):
        texts.encode(PROMPT, adapter(base, rank))
    assert dict(base.text_encoder.named_modules()) == modules
    assert all(value is parameters[name] for name, value in base.text_encoder.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in parameters.items())
    assert torch.equal(theirs(base, PROMPT, None), plain)


def test_a_reading_that_fails_leaves_its_slot_and_is_not_remembered(
    base: StableDiffusionPipeline, texts: Texts
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room")

    ada = adapter(base)
    handle = texts._slots.module.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no room"):
        texts.encode(PROMPT, ada)
    handle.remove()
    assert texts._slots._users.total() == 0
    assert is_close(texts.encode(PROMPT, ada), theirs(base, PROMPT, ada))
    assert torch.equal(texts.encode(PROMPT, None), theirs(base, PROMPT, None))
