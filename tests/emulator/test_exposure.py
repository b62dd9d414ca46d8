"""What stands open in an emulator, counted by hand on networks whose weights are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedpeat.emulator.exposure import Exposure, exposure
from fedpeat.emulator.few_bits import store_in_few_bits
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.model.blocks import BlockList, Blocks, find_blocks
from fedpeat.model.cut import build_from_blocks
from tiny import tiny_model

CPU = torch.device("cpu")


def packed(kept: tuple[int, ...], dtype: torch.dtype = torch.float32) -> EmulatorPackage:
    model = tiny_model("gpt2")
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, kept)
    return pack_emulator(
        small, model, blocks, kept, layers=(), recipe="", dtype=dtype, parent_sha256="0" * 64
    )


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_blocks_and_what_is_outside_of_blocks_count_and_tied_weights_once(
    dtype: torch.dtype,
) -> None:
    model: Any = tiny_model("gpt2")
    package = packed((0, 2, 5), dtype)
    found = exposure(package.manifest, package.build(CPU, torch.float32), model)
    dropped = sum(size(model.transformer.h[i]) for i in (1, 3, 4))
    held = size(model) - dropped
    assert found == Exposure(size(model), held, held)


@pytest.mark.parametrize(("change", "equal", "near"), [(1e-3, 0, 1), (0.04, 0, 1), (0.2, 0, 0)])
def test_a_weight_that_was_moved_a_little_is_a_near_copy(
    change: float, equal: int, near: int
) -> None:
    model, package = tiny_model("gpt2"), packed((0, 2, 5))
    before = exposure(package.manifest, package.build(CPU, torch.float32), model)
    emulator: Any = package.build(CPU, torch.float32)
    weight = emulator.transformer.h[1].mlp.c_fc.weight
    weight.mul_(1 + change)
    found = exposure(package.manifest, emulator, model)
    assert before.num_equal - found.num_equal == weight.numel() * (1 - equal)
    assert before.num_near - found.num_near == weight.numel() * (1 - near)


def test_a_block_at_another_place_is_compared_with_the_one_that_it_came_from() -> None:
    model, package = tiny_model("gpt2"), packed((0, 2, 5))
    wrong = replace(package.manifest, source_blocks=(0, 3, 5))
    emulator: Any = package.build(CPU, torch.float32)
    matrices = [p for p in emulator.transformer.h[1].parameters() if p.ndim == 2]
    right = exposure(package.manifest, emulator, model).num_near
    assert right - exposure(wrong, emulator, model).num_near == sum(p.numel() for p in matrices)


class Layers(nn.Module):
    """Two layers, the second made narrower on request."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        second: Any = nn.Module()
        second.weight = nn.Parameter(weight)
        self.blocks: Any = nn.ModuleList([nn.Linear(4, 4, bias=False), second])


@pytest.mark.parametrize("dimension", [0, 1])
def test_rows_and_columns_of_a_narrower_layer_count(dimension: int) -> None:
    manifest = replace(
        packed((0, 5)).manifest,
        blocks=Blocks((BlockList(("blocks",), 2),)),
        source_blocks=(0, 1),
    )
    full = Layers(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    some = full.blocks[1].weight.detach().index_select(dimension, torch.tensor([4, 1, 3])).clone()
    some[(0, slice(None)) if dimension == 0 else (slice(None), 0)] *= 1.01
    small = Layers(some)
    small.blocks[0] = full.blocks[0]
    line = 8 if dimension == 0 else 6
    assert exposure(manifest, small, full) == Exposure(16 + 48, 16 + 2 * line, 16 + 3 * line)


def test_a_layer_of_another_form_exposes_nothing() -> None:
    manifest = replace(
        packed((0, 5)).manifest,
        blocks=Blocks((BlockList(("blocks",), 2),)),
        source_blocks=(0, 1),
    )
    full, small = Layers(torch.randn(6, 8)), Layers(torch.randn(3, 5))
    small.blocks[0] = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    assert exposure(manifest, small, full) == Exposure(64, 0, 0)


def test_layers_in_few_bits_count_by_the_matrix_that_they_amount_to() -> None:
    model, blocks = tiny_model("llama"), find_blocks(tiny_model("llama"))
    manifest = packed((0, 5)).manifest
    every = replace(manifest, blocks=blocks, source_blocks=tuple(range(6)))
    whole = size(model)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    for kind, num_near in (("int8", whole), ("int4", whole - matrices)):
        small = build_from_blocks(model, blocks, range(6))
        store_in_few_bits(small, kind)  # type: ignore[arg-type]
        found = exposure(every, small, model)
        assert (found.num_equal, found.num_near) == (whole - matrices, num_near), kind
