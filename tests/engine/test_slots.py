"""Rows of different adapters in one forward give what each gives alone, merged into the base."""

import queue
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from api.engine.adapters import Adapter, LayerDelta, find_adapter_file, load_adapter
from api.engine.slots import NO_ADAPTER, NotForSlots, Slots, SlotsFull
from tests import builders
from tests.builders import CONV, LINEAR, OUT, POINTWISE, TEXT_LAYERS, UNET_LAYERS

# Every kind of layer there is in a UNet: before and after the batch's tokens, with a stride, after an interpolation.
MORE_LAYERS = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.conv_shortcut",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.upsamplers.0.conv",
)
ALL_LAYERS = UNET_LAYERS + MORE_LAYERS
COUNT = 4
ROWS = 6
PATIENCE = 60


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


def adapter(
    base: StableDiffusionPipeline,
    layers: Sequence[str] = ALL_LAYERS,
    ranks: Sequence[int] = (2,),
    seed: int = 5,
    change: float = 1.0,
) -> Adapter:
    """An adapter that changes each layer about as much as the base does (times `change`), with the ranks in turn."""
    deltas = []
    for number, layer in enumerate(layers):
        rank = ranks[number % len(ranks)]
        pair = builders.factors(base.unet, (layer,), rank, seed * 100 + number)[layer]
        size = (rank * pair["A"][0].numel()) ** 0.5 / 4  # of the product's sum over ranks and inputs
        deltas.append(LayerDelta("unet", layer, pair["A"], pair["B"], change / size))
    return Adapter(tuple(deltas))


def inputs(rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise, words = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 7, 16, generator=generator)
    return noise, torch.randint(0, 1000, (rows,), generator=generator), words


@torch.inference_mode()
def draw(unet: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    drawn = unet(*rows).sample
    assert isinstance(drawn, Tensor)
    return drawn


def solo(base: StableDiffusionPipeline, adapter: Adapter | None, rows: tuple[Tensor, ...]) -> Tensor:
    """Each row alone, the adapter merged."""
    unet = builders.with_merged(base, adapter).unet
    return torch.cat([draw(unet, tuple(part[i : i + 1] for part in rows)) for i in range(len(rows[0]))])


def together(slots: Slots, chosen: Sequence[int], rows: tuple[Tensor, ...]) -> Tensor:
    with slots.rows(chosen):
        return draw(slots.module, rows)


def is_close(some: Tensor, other: Tensor) -> bool:
    return torch.allclose(some, other, rtol=1e-5, atol=1e-5)


ATTENTION = (LINEAR, OUT)
Writer = Callable[[Path, builders.Factors, builders.Factors], Path]
WRITERS: dict[str, Writer] = {
    "diffusers": builders.diffusers_lora,
    "diffusers before peft": builders.old_diffusers_lora,
    "kohya": builders.kohya_lora,
    "kohya with alphas": partial(builders.kohya_lora, alpha=0.5),
    "the oldest": lambda file, unet, _: builders.oldest_diffusers_lora(file, {name: unet[name] for name in ATTENTION}),
    "peft": lambda file, _unet, _text: builders.peft_lora(
        file.with_suffix(""), builders.pipeline().unet, ("attn1.to_q", "conv1", "time_emb_proj"), lora_alpha=5
    ),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("strength", [0.5, -0.3])
def test_every_style_of_file_draws_in_rows_as_it_does_alone(
    tmp_path: Path, base: StableDiffusionPipeline, write: Writer, strength: float
) -> None:
    unet = builders.factors(base.unet, UNET_LAYERS)
    text = builders.factors(base.text_encoder, TEXT_LAYERS)
    file = find_adapter_file(write(tmp_path / "lora.safetensors", unet, text))
    mine, other = load_adapter(file, base, strength), adapter(base)
    rows = inputs(4)
    alone = [solo(base, each, rows) for each in (mine, None, other)]
    slots = Slots(base.unet, "unet", COUNT)
    mine_slot, other_slot = slots.acquire(mine), slots.acquire(other)
    drawn = together(slots, [other_slot, mine_slot, NO_ADAPTER, mine_slot], rows)
    for row, kind in enumerate((2, 0, 1, 0)):
        assert is_close(drawn[row], alone[kind][row])
        assert not any(is_close(drawn[row], alone[wrong][row]) for wrong in {0, 1, 2} - {kind})


RANKS = st.lists(st.integers(1, 64), min_size=1, max_size=3)
LAYERS = st.lists(st.sampled_from(ALL_LAYERS), min_size=1, max_size=5, unique=True)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(LAYERS, RANKS), min_size=COUNT, max_size=COUNT),
    chosen=st.lists(st.integers(0, COUNT), min_size=1, max_size=ROWS),
    again=st.lists(st.integers(0, COUNT), min_size=1, max_size=ROWS),
)
def test_any_mix_of_layers_ranks_and_slots_draws_as_each_alone(
    base: StableDiffusionPipeline,
    shapes: list[tuple[list[str], list[int]]],
    chosen: list[int],
    again: list[int],
) -> None:
    adapters = [adapter(base, layers, ranks, seed) for seed, (layers, ranks) in enumerate(shapes)]
    slots = Slots(base.unet, "unet", COUNT)
    users = [NO_ADAPTER, *(slots.acquire(each) for each in adapters)]
    unets = [base.unet, *(builders.with_merged(base, each).unet for each in adapters)]
    for plan in (chosen, again):
        rows = inputs(len(plan))
        drawn = together(slots, [users[user] for user in plan], rows)
        for row, user in enumerate(plan):
            one = tuple(part[row : row + 1] for part in rows)
            assert is_close(drawn[row : row + 1], draw(unets[user], one))


SIDES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(kernel=SIDES, stride=SIDES, padding=SIDES.map(lambda sides: (sides[0] - 1, sides[1] - 1)), dilation=SIDES)
def test_convolutions_move_as_the_bare_one_does(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation)
    deltas = [LayerDelta("unet", "0", torch.randn(2, 3, *kernel), torch.randn(5, 2, 1, 1), 0.3) for _ in range(2)]
    module, x = nn.Sequential(conv), torch.randn(3, 3, 7, 8)
    slots = Slots(module, "unet", 2)
    one, two = (slots.acquire(Adapter((delta,))) for delta in deltas)
    with slots.rows([two, NO_ADAPTER, one]):
        drawn = slots.module(x)
    weights = (deltas[1].merged(conv.weight), conv.weight, deltas[0].merged(conv.weight))
    for row, weight in enumerate(weights):
        alone = functional.conv2d(x[row : row + 1], weight, conv.bias, stride, padding, dilation)
        assert is_close(drawn[row : row + 1], alone)


def test_two_hundred_rounds_of_coming_and_going_never_mix_users(base: StableDiffusionPipeline) -> None:
    dice = random.Random(3)
    rows = inputs(ROWS)
    people = [adapter(base, dice.sample(ALL_LAYERS, 4), [dice.choice((1, 4, 9, 16, 40))], seed) for seed in range(9)]
    alone = [solo(base, person, rows) for person in people]
    plain = solo(base, None, rows)
    assert not any(is_close(one[0], other[0]) for one in alone for other in [*alone, plain] if one is not other)
    slots = Slots(base.unet, "unet", COUNT)
    held: list[tuple[int, int]] = []  # (slot, person) of each use
    full = drawn_rows = 0
    for _ in range(200):
        person = dice.randrange(len(people))
        match dice.choice(("acquire", "acquire", "release", "drop", "draw")):
            case "acquire":
                try:
                    slot = slots.acquire(people[person])
                except SlotsFull:
                    full += 1
                    assert len({slot for slot, _ in held}) == COUNT
                    continue
                assert all(other == person for used, other in held if used == slot)
                held.append((slot, person))
            case "release" if held:
                slots.release(held.pop(dice.randrange(len(held)))[0])
            case "drop":
                slots.drop(people[person])
                assert people[person].key not in slots.warm()
            case "draw":
                plan = [dice.choice([(NO_ADAPTER, -1), *held]) for _ in range(ROWS)]
                drawn = together(slots, [slot for slot, _ in plan], rows)
                for row, (_, person) in enumerate(plan):
                    assert is_close(drawn[row], (alone[person] if person >= 0 else plain)[row])
                    drawn_rows += 1
    assert full
    assert drawn_rows > 100


@pytest.fixture
def slots(base: StableDiffusionPipeline) -> Slots:
    return Slots(base.unet, "unet", 2)


def contents(slots: Slots, slot: int) -> list[Tensor]:
    return [factor[slot].clone() for table in slots._tables.values() for factor in table.tensors()]


def test_an_adapter_is_copied_once_and_counted(base: StableDiffusionPipeline, slots: Slots) -> None:
    ada, bo, cy = (adapter(base, seed=seed) for seed in range(3))
    first, second = slots.acquire(ada), slots.acquire(ada)
    assert first == second != NO_ADAPTER
    slots.release(first)
    slots.acquire(bo)
    with pytest.raises(SlotsFull, match="all 2 slots are in use"):
        slots.acquire(cy)
    slots.release(first)
    assert slots.acquire(cy) == first
    assert slots.warm() == [bo.key, cy.key]


def test_the_idle_leave_least_recently_used_first(base: StableDiffusionPipeline, slots: Slots) -> None:
    ada, bo, cy = (adapter(base, seed=seed) for seed in range(3))
    its, bos = slots.acquire(ada), slots.acquire(bo)
    slots.release(bos)
    slots.release(its)
    assert slots.warm() == [bo.key, ada.key]
    assert slots.acquire(ada) == its
    slots.release(its)
    assert slots.acquire(cy) == bos
    assert slots.warm() == [ada.key, cy.key]


def test_a_slot_in_use_is_never_overwritten(base: StableDiffusionPipeline, slots: Slots) -> None:
    ada, others = adapter(base), [adapter(base, seed=number) for number in range(5)]
    held = slots.acquire(ada)
    before = contents(slots, held)
    for other in others:
        slots.release(slots.acquire(other))
    assert all(torch.equal(one, two) for one, two in zip(before, contents(slots, held), strict=True))
    assert slots.warm() == [ada.key, others[-1].key]


def test_a_higher_rank_keeps_the_others(base: StableDiffusionPipeline, slots: Slots) -> None:
    rows = inputs(2)
    ada = slots.acquire(adapter(base, ranks=[3]))
    drawn = together(slots, [ada, ada], rows)
    buffers = [table.tensors()[0].data_ptr() for table in slots._tables.values()]
    slots.release(slots.acquire(adapter(base, ranks=[4])))
    assert buffers == [table.tensors()[0].data_ptr() for table in slots._tables.values()]
    small = slots.nbytes
    slots.acquire(adapter(base, [LINEAR], ranks=[33]))
    assert {name: table.tensors()[0].shape[1] for name, table in slots._tables.items()} == dict.fromkeys(
        ALL_LAYERS, 4
    ) | {LINEAR: 64}
    assert slots.nbytes == small + 60 * (8 + 8) * 3 * 4  # ranks × (in + out) × slots × float32
    assert is_close(together(slots, [ada, ada], rows), drawn)


def test_every_byte_is_counted(base: StableDiffusionPipeline, slots: Slots) -> None:
    assert slots.nbytes == 0
    slot = slots.acquire(adapter(base, [CONV]))
    assert slots.nbytes == 3 * 4 * (8 * 9 + 16) * 4  # slots × ranks × (in × 3 × 3 + out) × float32
    with slots.rows([slot, slot]):
        assert slots.nbytes == 3 * 4 * (8 * 9 + 16) * 4


def test_drop_erases_what_is_idle_now_and_the_rest_at_its_release(base: StableDiffusionPipeline, slots: Slots) -> None:
    rows = inputs(1)
    first, second, third = (adapter(base, seed=seed) for seed in range(3))
    idle, used = slots.acquire(first), slots.acquire(second)
    drawn = together(slots, [used], rows)
    slots.release(idle)
    for each in (first, second, third):
        slots.drop(each)
    assert slots.warm() == []
    assert not any(factor.any() for factor in contents(slots, idle))
    assert torch.equal(together(slots, [used], rows), drawn)
    again = slots.acquire(second)  # by who came after the drop: a copy of its own
    assert again == idle
    slots.release(used)
    assert not any(factor.any() for factor in contents(slots, used))
    assert slots.warm() == [second.key]


def test_drops_on_another_thread_reach_nobody_who_draws(base: StableDiffusionPipeline) -> None:
    slots, rows = Slots(base.unet, "unet", 8), inputs(ROWS)
    people = [adapter(base, seed=seed) for seed in range(2)]
    alone = [solo(base, person, rows) for person in people]
    others = [adapter(base, ranks=[rank], seed=rank) for rank in (1, 3, 9)]
    held = [slots.acquire(person) for person in people]
    plan = [held[row % 2] for row in range(ROWS)]
    coming: queue.SimpleQueue[Adapter | None] = queue.SimpleQueue()

    def drop_them() -> int:
        dropped = 0
        while (other := coming.get()) is not None:
            slots.drop(other)
            dropped += 1
        return dropped

    with ThreadPoolExecutor(1) as elsewhere:
        dropping = elsewhere.submit(drop_them)
        for number in range(60):
            other = others[number % 3]
            slots.release(slots.acquire(other))
            coming.put(other)
            drawn = together(slots, plan, rows)
            for row in range(ROWS):
                assert is_close(drawn[row], alone[row % 2][row])
        for person in people:  # dropped while it is used
            coming.put(person)
        coming.put(None)
        assert dropping.result(PATIENCE) == 62
    assert slots.warm() == []
    drawn = together(slots, plan, rows)
    assert all(is_close(drawn[row], alone[row % 2][row]) for row in range(ROWS))
    for slot in held:
        slots.release(slot)
    assert not any(factor.any() for table in slots._tables.values() for factor in table.tensors())
    assert sorted(slots.acquire(adapter(base, seed=seed)) for seed in range(8)) == [*range(1, 9)], "no slot is lost"


def test_a_lost_copy_loses_no_slot(base: StableDiffusionPipeline, slots: Slots) -> None:
    ada = adapter(base)
    slots.acquire(ada)
    slots.release(slots.acquire(adapter(base, seed=6)))
    whole = adapter(base, seed=7)
    broken = Adapter((*whole.deltas[:3], LayerDelta("unet", CONV, torch.ones(2, 5), torch.ones(16, 2), 1.0)))
    with pytest.raises(RuntimeError):
        slots.acquire(broken)
    assert slots.warm() == [ada.key]
    rows = inputs(1)
    cy = slots.acquire(whole)
    assert is_close(together(slots, [cy], rows), solo(base, whole, rows))


def test_rows_without_an_adapter_cost_and_change_nothing(
    base: StableDiffusionPipeline, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = inputs(3)
    bare = draw(slots.module, rows)
    slots.acquire(adapter(base))
    monkeypatch.setattr(torch, "bmm", None)
    assert torch.equal(together(slots, [NO_ADAPTER] * 3, rows), bare)
    assert torch.equal(draw(slots.module, rows), bare)


def test_text_changes_are_left_to_others(base: StableDiffusionPipeline, slots: Slots) -> None:
    pair = builders.factors(base.text_encoder, TEXT_LAYERS[:1])[TEXT_LAYERS[0]]
    only_text = Adapter((LayerDelta("text_encoder", TEXT_LAYERS[0], pair["A"], pair["B"], 1.0),))
    assert slots.acquire(only_text) == NO_ADAPTER
    slots.release(NO_ADAPTER)
    assert (slots.warm(), slots.nbytes) == ([], 0)


def test_slots_that_nobody_holds_are_refused(base: StableDiffusionPipeline, slots: Slots) -> None:
    ada = slots.acquire(adapter(base))
    for unknown in (2, 3, -1):
        with pytest.raises(ValueError, match=f"slot {unknown} is not in use"), slots.rows([ada, unknown]):
            pass
        with pytest.raises(ValueError, match=f"slot {unknown} is not in use"):
            slots.release(unknown)
    with slots.rows([ada]), pytest.raises(ValueError, match="chosen already"), slots.rows([ada]):
        pass
    slots.release(ada)
    with pytest.raises(ValueError, match="not in use"), slots.rows([ada]):
        pass


@pytest.mark.parametrize("layer", [LINEAR, CONV, POINTWISE, "time_embedding.linear_1"])
def test_a_batch_of_another_size_is_refused(base: StableDiffusionPipeline, slots: Slots, layer: str) -> None:
    ada = slots.acquire(adapter(base, [layer]))
    for size in (1, 4):
        with pytest.raises(RuntimeError):
            together(slots, [ada] * 2, inputs(size))


def test_the_rows_end_when_the_drawing_fails(base: StableDiffusionPipeline, slots: Slots) -> None:
    rows = inputs(1)
    bare = draw(slots.module, rows)
    ada = slots.acquire(adapter(base))
    with pytest.raises(KeyboardInterrupt), slots.rows([ada]):
        raise KeyboardInterrupt
    assert torch.equal(draw(slots.module, rows), bare)


def test_what_does_not_fit_in_slots_is_refused(base: StableDiffusionPipeline, slots: Slots) -> None:
    with pytest.raises(NotForSlots, match="rank is over 128"):
        slots.acquire(adapter(base, [LINEAR], ranks=[129]))
    slots.module.get_submodule("mid_block.attentions.0").proj_in = nn.Conv2d(16, 16, 1, groups=2)
    with pytest.raises(NotForSlots, match="unusual kind"):
        slots.acquire(adapter(base, [POINTWISE]))
    assert (slots.warm(), slots.nbytes) == ([], 0)


def test_the_module_stays_as_it_is_and_shares_its_weights_with_the_copy(base: StableDiffusionPipeline) -> None:
    mine = builders.pipeline().unet
    modules, rows, whole = dict(mine.named_modules()), inputs(2), adapter(base)
    inside = {name: (type(module), dict(module._parameters)) for name, module in modules.items()}
    bare = draw(mine, rows)
    slots = Slots(mine, "unet", 2)
    # While it loads a model, accelerate has every module that is given a parameter put it on "meta".
    with init_empty_weights():
        slot = slots.acquire(whole)
    drawn = together(slots, [slot, slot], rows)
    assert is_close(drawn, solo(base, whole, rows))
    assert not is_close(drawn, bare)
    assert dict(mine.named_modules()) == modules
    assert {name: (type(module), module._parameters) for name, module in modules.items()} == inside
    assert torch.equal(draw(mine, rows), bare)
    own, theirs = dict(mine.named_parameters()), dict(slots.module.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own)
    wrapped = {name for name, module in slots.module.named_modules() if type(module) is not type(modules[name])}
    assert wrapped == set(ALL_LAYERS)


def test_two_copies_of_one_module_have_slots_of_their_own(base: StableDiffusionPipeline) -> None:
    ada, bo, rows = adapter(base), adapter(base, seed=6), inputs(1)
    one, other = (Slots(base.unet, "unet", 1) for _ in range(2))
    first, second = one.acquire(ada), other.acquire(bo)
    assert is_close(together(one, [first], rows), solo(base, ada, rows))
    assert is_close(together(other, [second], rows), solo(base, bo, rows))
    one.drop(bo)
    assert (one.warm(), other.warm()) == ([ada.key], [bo.key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_have_the_precision_of_the_module(base: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    half = builders.pipeline().unet.to(dtype)
    slots, whole, (noise, steps, words) = Slots(half, "unet", 2), adapter(base, change=0.5), inputs(2)
    slot = slots.acquire(whole)
    assert {factor.dtype for factor in contents(slots, slot)} == {dtype}
    drawn = together(slots, [slot, NO_ADAPTER], (noise.to(dtype), steps, words.to(dtype)))
    alone = torch.cat([solo(base, user, inputs(2))[row : row + 1] for row, user in enumerate((whole, None))])
    assert drawn.dtype == dtype
    assert torch.allclose(drawn.float(), alone, atol=0.1 * alone.abs().max().item())


def test_factors_written_in_inference_mode_can_be_written_outside_of_it(
    base: StableDiffusionPipeline, slots: Slots
) -> None:
    first = adapter(base)
    with torch.inference_mode():
        ada = slots.acquire(first)
        together(slots, [ada], inputs(1))
        slots.release(ada)
    slots.drop(first)
    slot = slots.acquire(adapter(base, seed=6))
    with slots.rows([slot]):
        assert slots.module(*inputs(1)).sample.requires_grad


def test_new_users_are_copies_that_compile_nothing_anew(base: StableDiffusionPipeline) -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    shapes = ((4, 3, 3), (8, 1, 1), (8,))

    def user(rank: int) -> Adapter:
        return Adapter(
            tuple(
                LayerDelta("unet", str(number), torch.randn(rank, *shape), torch.randn(8, rank), 0.1)
                for number, shape in enumerate(shapes)
            )
        )

    slots = Slots(module, "unet", 2)
    held = [slots.acquire(user(4)) for _ in range(2)]
    counter = CompileCounter()
    compiled = torch.compile(slots.module, backend=counter, fullgraph=True, dynamic=False)
    x = torch.randn(3, 4, 16, 16)
    buffers = [factor.data_ptr() for table in slots._tables.values() for factor in table.tensors()]
    for rank in range(1, 5):
        slots.release(held.pop(0))
        held.append(slots.acquire(user(rank)))
        for chosen in ([NO_ADAPTER] * 3, [held[0], NO_ADAPTER, held[1]], [held[1]] * 3):
            with torch.inference_mode(), slots.rows(chosen):
                assert torch.allclose(compiled(x), slots.module(x), atol=1e-6)
    assert counter.frame_count == 2  # without any adapter, and with some
    assert buffers == [factor.data_ptr() for table in slots._tables.values() for factor in table.tensors()]
