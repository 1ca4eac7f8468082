import errno
import gc
import json
import pickle
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from api.engine.weights import (
    MAX_TENSORS,
    TensorPool,
    load_noted,
    loading,
    read_header,
    save_whole,
    storages_of,
    tensors_of,
    write_tensors,
)
from api.errors import ModelUnavailable, OutOfMemory
from tests import builders


def with_header(header: Any, data: bytes = b"", declared: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def small(file: Path) -> bytes:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, file, {"made": "by a test"})
    return file.read_bytes()


def test_the_header_of_a_whole_file(file: Path) -> None:
    small(file)
    header = read_header(file)
    assert header["__metadata__"] == {"made": "by a test"}
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert header["b"]["dtype"] == "F16"


def test_a_file_cut_at_any_byte_is_refused(file: Path) -> None:
    whole = small(file)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelUnavailable, match=r"weights\.safetensors"):
            read_header(file)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.SafeTensors", "model.bin", "model.ckpt"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_under_any_name(tmp_path: Path, name: str, protocol: int) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"weight": list(range(100))}, protocol))
    with pytest.raises(ModelUnavailable, match="not a safetensors file") as caught:
        read_header(file)
    assert "pickle" in caught.value.hint


def test_what_torch_saves_is_refused(file: Path) -> None:
    for zipped in (True, False):
        torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ModelUnavailable, match="not a safetensors file"):
            read_header(file)


NOT_SAFETENSORS = {
    "empty": b"",
    "huge declared header": with_header({}, declared=2**63),
    "header of 100 MB declared": with_header({}, b"\0" * 100, declared=100_000_000),
    "header over the limit": with_header(b"{" + b" " * 3_000_000 + b"}"),
    "not JSON": with_header(b"{'a': 1}"),
    "not text": with_header(b"\xff\xfe\x00\x01"),
    "a list": with_header([1, 2]),
    "deep JSON": with_header(b"[" * 500_000),
    "deep JSON object": with_header(b'{"a":' * 200_000),
    "entry is null": with_header({"a": None}),
    "entry is text": with_header({"a": "b"}),
    "entry without offsets": with_header({"a": {"dtype": "F32", "shape": [1]}}),
    "entry without shape": with_header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
    "entry without dtype": with_header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "one offset": with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
    "offsets are text": with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}),
    "offsets are mixed": with_header({"a": entry(0, 4), "b": {**entry(0, 4), "data_offsets": [0, "4"]}}, b"\0" * 4),
    "offsets are null": with_header({"a": {**entry(0, 4), "data_offsets": [None, None]}}),
    "shape is text": with_header({"a": {**entry(0, 4), "shape": "11"}}, b"\0" * 4),
    "shape holds text": with_header({"a": {**entry(0, 4), "shape": ["1"]}}, b"\0" * 4),
    "shape is negative": with_header({"a": {**entry(0, 4), "shape": [-1]}}, b"\0" * 4),
    "a number with a million digits": with_header(b'{"a":' + b"9" * 1_000_000 + b"}"),
}


@pytest.mark.parametrize("content", NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS)
def test_what_is_not_safetensors_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"weights\.safetensors"):
        read_header(file)


def test_too_many_tensors_are_refused(file: Path) -> None:
    header = {f"t{number}": entry(0, 4) for number in range(MAX_TENSORS)}
    file.write_bytes(with_header(header, b"\0" * 4))
    assert len(read_header(file)) == MAX_TENSORS
    file.write_bytes(with_header({**header, "one more": entry(0, 4)}, b"\0" * 4))
    with pytest.raises(ModelUnavailable, match="over the limit of 10000"):
        read_header(file)


def test_missing_bytes_are_counted(file: Path) -> None:
    file.write_bytes(small(file)[:-5])
    with pytest.raises(ModelUnavailable, match="5 bytes are missing"):
        read_header(file)


@pytest.mark.parametrize("path", ["nothing", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        read_header(tmp_path / path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": JSON, "shape": JSON | st.lists(JSON, max_size=3), "data_offsets": st.lists(JSON, max_size=3)}
)
CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.builds(with_header, JSON, st.binary(max_size=20)),
    st.builds(with_header, st.dictionaries(st.text(max_size=5), ENTRIES | JSON, max_size=4), st.binary(max_size=20)),
    st.builds(with_header, st.binary(max_size=100), st.binary(max_size=20), st.integers(0, 2**64 - 1)),
)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=CONTENTS)
def test_nothing_but_model_unavailable_comes_out(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        header = read_header(file)
    except ModelUnavailable:
        return
    assert all(
        {"dtype", "shape", "data_offsets"} <= value.keys() for key, value in header.items() if key != "__metadata__"
    )


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(file: Path, place: int, value: int) -> None:
    content = bytearray(small(file))
    content[place % len(content)] = value
    file.write_bytes(content)
    try:
        read_header(file)
    except ModelUnavailable:
        return


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no config.json in /srv/models/ada/unet.\nSee the manual."), "no config.json in ada/unet."),
        (KeyError(), "KeyError"),
    ],
)
def test_what_a_library_raises_is_one_error_of_ours(error: Exception, reason: str) -> None:
    with pytest.raises(ModelUnavailable) as caught, loading("models/ada", Path("/srv/models/ada"), "Copy it again."):
        raise error
    assert (caught.value.detail, caught.value.hint) == (f"models/ada does not load: {reason}", "Copy it again.")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ModelUnavailable("cut short"), OutOfMemory("no room"), MemoryError()])
def test_our_own_errors_and_want_of_memory_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, loading("models/ada", Path("/srv/models/ada")):
        raise error
    assert caught.value is error


def test_tensors_are_written_whole_or_it_is_told_why(tmp_path: Path) -> None:
    file, tensors = tmp_path / "state.safetensors", {"a": torch.arange(9.0)}
    save_whole(tensors, file, "note")
    assert load_noted(file, "other") is None
    assert torch.equal((load_noted(file, "note") or {})["a"], tensors["a"])
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="No such file") as caught:
        write_tensors(tensors, tmp_path / "nowhere" / "x")
    assert caught.value.errno == errno.ENOENT
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


class Small(nn.Module):
    def __init__(self, fill: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        if fill is not None:
            nn.init.constant_(self.first.weight, fill)
            nn.init.constant_(self.last.weight, fill)


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters(remove_duplicate=False)}


def test_equal_parameters_are_held_once() -> None:
    pool, first, second = TensorPool(), Small(), Small()
    pool.share("unet", first)
    pool.share("unet", second)
    assert addresses(first) == addresses(second)
    assert second.first.weight is first.first.weight


def test_only_the_changed_parameter_is_held_twice() -> None:
    pool, first, second = TensorPool(), Small(), Small()
    with torch.no_grad():
        second.last.bias.add_(1)
    pool.share("unet", first)
    pool.share("unet", second)
    different = {name for name in addresses(first) if addresses(first)[name] != addresses(second)[name]}
    assert different == {"last.bias"}
    assert not torch.equal(first.last.bias, second.last.bias)


def test_different_parameters_with_one_fingerprint_stay_apart() -> None:
    pool = TensorPool()
    first, second = nn.Linear(1000, 10, bias=False), nn.Linear(1000, 10, bias=False)
    with torch.no_grad():
        second.weight.copy_(first.weight)
        second.weight[0, 1] += 1  # beside the values that the fingerprint samples
    pool.share("unet", first)
    pool.share("unet", second)
    assert second.weight is not first.weight
    assert second.weight[0, 1] == first.weight[0, 1] + 1


@pytest.mark.parametrize(
    ("change", "component"),
    [(lambda one: one.to(torch.float16), "unet"), (lambda one: one, "vae")],
    ids=["another precision", "another component"],
)
def test_what_only_looks_alike_stays_apart(change: Any, component: str) -> None:
    pool, first, second = TensorPool(), Small(1.0), change(Small(1.0))
    pool.share("unet", first)
    pool.share(component, second)
    assert not set(addresses(first).values()) & set(addresses(second).values())
    assert second.first.weight.dtype == (torch.float16 if component == "unet" else torch.float32)


def test_two_equal_layers_of_one_model_are_never_made_one() -> None:
    pool, first, second = TensorPool(), Small(0.5), Small(0.5)
    pool.share("unet", first)
    pool.share("unet", second)
    for module in (first, second):
        assert len(set(addresses(module).values())) == len(addresses(module))


def test_the_pool_keeps_nothing_alive() -> None:
    pool, first = TensorPool(), Small()
    tokenizer = builders.read_tokenizer()
    pool.share("unet", first)
    pool.share_tokenizer(tokenizer)
    left = [weakref.ref(parameter) for parameter in first.parameters()] + [weakref.ref(tokenizer)]
    del first, tokenizer
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)
    again = Small()
    pool.share("unet", again)
    assert torch.equal(again.first.weight, Small().first.weight)


def test_a_shared_parameter_outlives_the_model_that_brought_it() -> None:
    pool, first, second = TensorPool(), Small(), Small()
    pool.share("unet", first)
    pool.share("unet", second)
    del first
    gc.collect()
    third = Small()
    pool.share("unet", third)
    assert addresses(third) == addresses(second)


def test_tokenizers_are_held_once_while_they_read_alike() -> None:
    pool = TensorPool()
    first, same, other = (builders.read_tokenizer() for _ in range(3))
    other.model_max_length = 12
    assert pool.share_tokenizer(first) is first
    assert pool.share_tokenizer(same) is first
    assert pool.share_tokenizer(other) is other


def test_storages_count_views_and_buffers_once() -> None:
    module = Small()
    module.register_buffer("view", module.first.weight.detach()[:2])
    storages = storages_of(tensors_of(module))
    parameters = sum(parameter.numel() * 4 for parameter in module.parameters())
    assert sum(size for _, size in storages.values()) == parameters + 2 * 16 * 4 + 8  # BatchNorm's buffers
    assert {device for device, _ in storages.values()} == {"cpu"}
