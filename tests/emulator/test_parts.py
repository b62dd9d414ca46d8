"""The parts of emulators: known by their hash, in memory once."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.package import EmulatorPackage, Memory, pack_emulator
from fedpeat.emulator.parts import part_bytes, read_part
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from tiny import CONFIGS, random_ids, tiny_model

CPU = torch.device("cpu")
LARGE, SMALL = (0, 1, 2, 5), (0, 2, 5)


def packed(kept: tuple[int, ...], kind: str = "llama") -> EmulatorPackage:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    return pack_emulator(
        build_from_blocks(model, blocks, kept),
        model,
        blocks,
        kept,
        recipe="",
        dtype=torch.float32,
        parent_sha256="",
    )


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
