"""The parts of emulators: known by their hash, in memory once."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.package import EmulatorPackage, Memory
from fedpeat.emulator.parts import part_bytes, read_part, tensor_names
from fedpeat.emulator.update import UPDATE
from fedpeat.federated.shelf import Rung
from tiny import CONFIGS, random_ids, tiny_package

CPU = torch.device("cpu")
LARGE, SMALL = (0, 1, 2, 5), (0, 2, 5)


def packed(kept: tuple[int, ...], kind: str = "llama") -> EmulatorPackage:
    return tiny_package(kept, kind, recipe="", parent_sha256="")


def storages(model: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_there_is_a_part_for_each_block_and_one_for_what_is_outside() -> None:
    names = [part.name for part in packed(SMALL).manifest.parts]
    assert names == ["outside", "block 0", "block 2", "block 5"]


def test_two_emulators_have_the_parts_of_their_common_blocks_in_common() -> None:
    for kind in CONFIGS:
        large, small = packed(LARGE, kind), packed(SMALL, kind)
        (added,) = large.parts.keys() - small.parts.keys()
        assert small.parts.keys() < large.parts.keys()
        assert {p.sha256: p.name for p in large.manifest.parts}[added] == "block 1"


def test_networks_built_from_one_memory_share_it_and_compute_as_if_they_did_not() -> None:
    memory: Memory = {}
    large, small = packed(LARGE), packed(SMALL)
    one, other = (p.build(CPU, torch.float32, memory) for p in (large, small))
    assert storages(other) < storages(one)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
    ids = random_ids()
    for package, network in ((large, one), (small, other)):
        alone = package.build(CPU, torch.float32)
        assert torch.equal(network(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_networks_of_another_type_than_the_parts_share_memory_too() -> None:
    memory: Memory = {}
    one, other = (packed(kept).build(CPU, torch.bfloat16, memory) for kept in (LARGE, SMALL))
    assert storages(other) < storages(one)
    assert {t.dtype for part in memory.values() for t in part.values()} == {torch.bfloat16}


def test_lacking_parts_are_named() -> None:
    small, large = packed(SMALL), packed(LARGE)
    held = [sha256[:16] for sha256 in small.parts]
    came = EmulatorPackage.from_payload(large.to_payload(held))
    assert came.lacking(held) == []
    assert came.lacking() == ["outside", "block 0", "block 2", "block 5"]


def test_a_part_is_read_in_the_order_of_its_names() -> None:
    tensors = {f"layer.{i}": torch.full((3,), float(i)) for i in range(100)}
    read = read_part(part_bytes(tensors))
    assert list(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_bound_may_be_infinite_and_nothing_else() -> None:
    read = read_part(part_bytes({"clip.input_max": torch.tensor(math.inf)}))
    assert read["clip.input_max"] == math.inf
    for broken in (
        torch.tensor(math.nan),
        torch.tensor([1.0, -math.inf]),
        torch.tensor([math.nan]),
    ):
        with pytest.raises(EmulatorError, match="w has values that are not finite"):
            read_part(part_bytes({"w": broken}))


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
SHAPES: list[tuple[int, ...]] = [(), (3,), (2, 3), (0,), (2, 0, 3)]


def some_part() -> bytes:
    """Return a part with a tensor of each type and each shape."""
    rng = np.random.default_rng(0)
    return part_bytes(
        {
            f"{dtype}.{shape}": torch.tensor(rng.integers(0, 2, shape)).to(dtype)
            for dtype in DTYPES
            for shape in SHAPES
        }
    )


def test_a_part_has_what_the_library_reads_in_it() -> None:
    content = some_part()
    want, got = safetensors.torch.load(content), read_part(content)
    assert got.keys() == want.keys()
    assert sorted(tensor_names(content)) == sorted(want)
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype
        assert tensor.shape == want[name].shape
        assert torch.equal(tensor, want[name])
        assert tensor.data_ptr() % 64 == 0


def file_of(header: object, num_bytes: int = 8) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def item(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def test_a_file_made_by_hand_is_read() -> None:
    empty = item(shape=[0], data_offsets=[0, 0])
    assert list(read_part(file_of({"w": item(), "v": empty}))) == ["v", "w"]
    assert read_part(file_of({"__metadata__": {"a": "b"}}, 0)) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        file_of({"w": item()})[:-1],
        file_of({"w": item()}) + b"1",
        (2**63).to_bytes(8, "little") + b"{}",
        file_of("[" * 100_000),
        file_of("{"),
        file_of([]),
        file_of(7),
        file_of({"w": []}),
        file_of({"w": {}}),
        file_of({"w": item(dtype="F31")}),
        file_of({"w": item(dtype=["F32"])}),
        file_of({"w": item(dtype="F" * 1000)}),
        file_of({"w": item(shape=[3])}),
        file_of({"w": item(shape=[-1, -2])}),
        file_of({"w": item(shape=[2.0])}),
        file_of({"w": item(shape=[True, 2])}),
        file_of({"w": item(shape=2)}),
        file_of({"w": item(shape=[2**70, 0], data_offsets=[0, 0])}, 0),
        file_of({"w": item(shape=[2**62, 2**62, 0], data_offsets=[0, 0])}, 0),
        file_of({"w": item(data_offsets=[0])}),
        file_of({"w": item(data_offsets=[8, 0])}),
        file_of({"w": item(data_offsets=[-8, 0])}),
        file_of({"w": item(data_offsets=[0, "8"])}),
        file_of({"w": item(data_offsets=[8, 16])}, 16),
        file_of({"v": item(), "w": item()}),
        file_of({"v": item(), "w": item()}, 16),
        file_of({"v": item(), "w": item(data_offsets=[16, 24])}, 24),
    ],
    ids=range(29),
)
def test_what_is_no_part_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(EmulatorError, match=f"a part of {len(content)} bytes") as refused:
        read_part(content)
    assert len(str(refused.value)) < 300
    with pytest.raises(SafetensorError):
        safetensors.torch.load(content)


def test_a_type_of_which_nobody_knows_what_is_finite_is_refused() -> None:
    with pytest.raises(EmulatorError, match="cannot be read: .*C64"):
        read_part(part_bytes({"w": torch.zeros(1, dtype=torch.complex64)}))


def test_nothing_is_read_that_the_library_would_not_read() -> None:
    content, rng, num_read = some_part(), np.random.default_rng(1), 0
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(2000):
        changed = bytearray(content)
        for place in rng.integers(0, length, rng.integers(1, 4)):
            changed[place] = rng.integers(32, 127) if place >= 8 else rng.integers(256)
        try:
            got = read_part(bytes(changed))
        except EmulatorError:
            continue
        want = safetensors.torch.load(bytes(changed))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        num_read += 1
    assert 100 < num_read < 1900


# --- what may be sent ---------------------------------------------------------------------------


def with_tensor(package: EmulatorPackage, part: str, name: str) -> EmulatorPackage:
    """Return an emulator with one tensor more in one of its parts, its hashes right."""
    content = next(package.parts[p.sha256] for p in package.manifest.parts if p.name == part)
    return package.with_parts({part: {**read_part(content), name: torch.ones(3)}})


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("block 0", "model.layers.1.mlp.up_proj.weight"),
        ("outside", "model.layers.3.mlp.up_proj.weight"),
        ("outside", "model.layers.0.mlp.up_proj.weight"),
        ("block 0", "model.layers.2.mlp.up_proj.weight"),
        ("block 2", "lm_head.more"),
    ],
    ids=["dropped block", "dropped, outside", "kept, outside", "another kept", "outside, in one"],
)
def test_an_emulator_with_a_tensor_that_is_not_its_own_is_never_sent(part: str, name: str) -> None:
    package = packed(SMALL)
    Rung.of(package, AdapterConfig(), [0, 5])
    leaking = with_tensor(package, part, name)
    leaking.verify()
    with pytest.raises(EmulatorError, match=f"got {name}; nothing is sent"):
        Rung.of(leaking, AdapterConfig(), [0, 5])


@pytest.mark.parametrize(("block", "is_sent"), [(2, True), (3, False)])
def test_an_update_of_a_dropped_block_is_never_sent(block: int, is_sent: bool) -> None:  # noqa: FBT001
    name = f"model.layers.{block}.mlp.up_proj.lora_A"
    package = packed(SMALL).with_parts({UPDATE: {name: torch.ones(2, 32)}})
    if is_sent:
        Rung.of(package, AdapterConfig(), [0, 5])
        return
    with pytest.raises(EmulatorError, match=f"got {name}; nothing is sent"):
        Rung.of(package, AdapterConfig(), [0, 5])


def test_bytes_of_no_tensor_in_a_part_are_never_sent() -> None:
    package = packed(SMALL)
    first = package.manifest.parts[0].sha256
    padded = replace(package, parts={**package.parts, first: package.parts[first] + b"secret"})
    with pytest.raises(EmulatorError, match="belong to no tensor"):
        Rung.of(padded, AdapterConfig(), [0, 5])
