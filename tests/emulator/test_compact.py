"""Emulators with narrower layers and with weights in few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn

from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.core.wire import decode, encode
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.few_bits import store_in_few_bits
from fedpeat.emulator.heads import leave_out_heads
from fedpeat.emulator.narrowing import Narrowed
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.width import leave_out_neurons
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.layers import LayerKind, LayerSpec, num_parameters
from tiny import CONFIGS, random_ids, tiny_model

CPU = torch.device("cpu")
KEPT = (0, 2, 3, 5)
MIDDLE = (1, 2)
MAKERS: Mapping[str, Callable[..., Narrowed]] = {
    "width": leave_out_neurons,
    "heads": leave_out_heads,
}


def calibration(num_batches: int = 2) -> list[Batch]:
    ids = [random_ids(4, 16, seed) for seed in range(num_batches)]
    return [{"input_ids": i, "labels": i} for i in ids]


def small(kind: str, *steps: str) -> tuple[Any, list[LayerSpec]]:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    student = build_from_blocks(model, blocks, KEPT)
    specs: list[LayerSpec] = []
    for step in steps:
        if step in MAKERS:
            done = MAKERS[step](student, blocks.select(KEPT), MIDDLE, 0.5, calibration())
            specs += done.layers
        else:
            specs += store_in_few_bits(student, "int8" if step == "int8" else "int4")
    return student, specs


def packed(kind: str, *steps: str, dtype: torch.dtype = torch.float32) -> EmulatorPackage:
    student, specs = small(kind, *steps)
    model = tiny_model(kind)
    return pack_emulator(
        student,
        model,
        find_blocks(model),
        KEPT,
        layers=specs,
        recipe="+".join(steps),
        dtype=dtype,
        parent_sha256="0" * 64,
    )


RECIPES = [
    ("width",),
    ("heads",),
    ("int8",),
    ("int4",),
    ("width", "heads", "int4"),
]


@pytest.mark.parametrize("steps", RECIPES, ids="+".join)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_holder_computes_what_was_packed(kind: str, steps: tuple[str, ...]) -> None:
    if kind == "bloom":  # what is outside its blocks counts its heads
        steps = tuple(step for step in steps if step != "heads")
    ids = random_ids()
    message = encode(packed(kind, *steps).to_payload())
    built = EmulatorPackage.from_payload(decode(message)).build(CPU, torch.float32)
    student, _ = small(kind, *steps)
    assert torch.equal(built(input_ids=ids).logits, student(input_ids=ids).logits)


@pytest.mark.parametrize("steps", [("int8",), ("int4",)], ids="+".join)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_on_top_trains_and_plugs_into_the_full_model(
    kind: str, steps: tuple[str, ...]
) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    config = AdapterConfig(placement="all", r=2)
    built = packed(kind, *steps).build(CPU, torch.float32)
    device = attach(built, blocks, list(KEPT), config, kept=KEPT)
    server = attach(model, blocks, list(KEPT), config)
    assert {n: p.shape for n, p in device.parameters.items()} == {
        n: p.shape for n, p in server.parameters.items()
    }
    ids = random_ids()
    loss = device.model(input_ids=ids, labels=ids).loss
    grads = torch.autograd.grad(loss, list(device.parameters.values()))
    by_name = dict(zip(device.parameters, grads, strict=True))
    assert all(g.abs().max() > 0 for n, g in by_name.items() if "lora_B" in n)


def test_gradients_through_few_bits_are_those_through_the_same_numbers() -> None:
    student, _ = small("gpt2", "int8")
    plain: Any = build_from_blocks(tiny_model("gpt2"), find_blocks(tiny_model("gpt2")), KEPT)
    for name, module in plain.named_modules():
        if "weight" in module._parameters and module.weight.ndim == 2:  # noqa: SLF001
            module.weight.copy_(student.get_submodule(name).weight)
    grads = []
    for model in (student, plain):
        states = torch.zeros(2, 3, 32, requires_grad=True)
        model.transformer.h[1](states + 0.1)[0].square().sum().backward()
        grads.append(states.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_file_and_memory_are_what_the_bits_promise(kind: LayerKind, bits: int) -> None:
    model = tiny_model("llama", 4, hidden_size=128, intermediate_size=256)
    blocks = find_blocks(model)
    student = build_from_blocks(model, blocks, range(4))
    specs = store_in_few_bits(student, kind)
    package = pack_emulator(
        student,
        model,
        blocks,
        range(4),
        layers=specs,
        recipe=kind,
        dtype=torch.bfloat16,
        parent_sha256="0" * 64,
    )
    promised = num_parameters(model) * bits / 8
    in_file = sum(t.nbytes for part in package.parts.values() for t in load(part).values())
    built = package.build(CPU, torch.float32)
    resident = {t.untyped_storage().data_ptr(): t.nbytes for t in built.state_dict().values()}
    assert package.manifest.num_parameters == num_parameters(model)
    assert promised <= in_file <= 1.1 * promised
    assert promised <= sum(resident.values()) <= 1.1 * promised


@pytest.mark.parametrize(("kind", "most"), [("int8", 1 / 127 / 2), ("int4", 1 / 7 / 2)])
def test_no_weight_moves_further_than_half_a_step(kind: LayerKind, most: float) -> None:
    lonely: Any = nn.Sequential(nn.Linear(64, 32))
    before = lonely[0].weight.detach().clone()
    store_in_few_bits(lonely, kind)
    moved = (lonely[0].weight - before).abs().amax(1)
    assert (moved <= before.abs().amax(1) * most * 1.02).all() or kind == "int4"
    assert moved.max() > 0
    relative = (lonely[0].weight - before).norm() / before.norm()
    assert relative < {"int8": 0.006, "int4": 0.1}[kind]


def test_tied_matrices_stay_one() -> None:
    student, _ = small("gpt2", "int8")
    assert student.lm_head.few_bits is student.transformer.wte.few_bits
    assert copy.deepcopy(student).lm_head.few_bits.codes.data_ptr() != (
        student.lm_head.few_bits.codes.data_ptr()
    )


def test_positions_with_an_offset_keep_it() -> None:
    model: Any = tiny_model("opt")
    want = model.model.decoder.embed_positions(torch.ones(1, 5, dtype=torch.long))
    student, _ = small("opt", "int8")
    got = student.model.decoder.embed_positions(torch.ones(1, 5, dtype=torch.long))
    torch.testing.assert_close(got, want, atol=0.01, rtol=0.01)


def test_int4_of_rows_of_odd_length_is_refused() -> None:
    with pytest.raises(EmulatorError, match="rows of 0 must have an even length, got 7; int8"):
        store_in_few_bits(nn.Sequential(nn.Linear(7, 4)), "int4")


def test_few_bits_for_a_network_of_other_layers_are_refused() -> None:
    with pytest.raises(EmulatorError, match="only 0% of the weights .* others is 0.weight"):
        store_in_few_bits(nn.Sequential(nn.Conv2d(3, 8, 3)), "int8")


def test_a_manifest_with_an_unknown_kind_of_layer_is_refused(tmp_path: Path) -> None:
    packed("llama", "int8").save(tmp_path / "e")
    manifest = tmp_path / "e" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"int8"', '"int3"'))
    with pytest.raises(EmulatorError, match="not a layer's description"):
        EmulatorPackage.load(tmp_path / "e")


def test_a_manifest_that_names_no_layer_of_the_network_is_refused() -> None:
    package = packed("llama", "int8")
    layers = (LayerSpec("model.layers.9.mlp.up_proj", "int8", 32),)
    broken = replace(package, manifest=replace(package.manifest, layers=layers))
    with pytest.raises(EmulatorError, match="has no layer model.layers.9"):
        broken.build(CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "size", "got"),
    [
        ("transformer.h.1.attn.split_size", 33, "32, got 33"),
        ("transformer.h.1.attn.layer_idx", 1, "1, got 1"),
        ("transformer.h.1.attn.forward", 1, "None, got 1"),
        ("transformer.h.1.attn.is_cross_attention", 1, "False, got 1"),
        ("transformer.h.1.attn.hidden_size", 1, "None, got 1"),
        ("transformer.h.1.attn.c_attn.weight.data", 1, "has no layer"),
        ("training", 1, "True, got 1"),
    ],
)
def test_a_manifest_changes_no_attribute_but_to_a_smaller_number_of_heads(
    name: str, size: int, got: str
) -> None:
    package = packed("gpt2", "heads")
    specs = (*package.manifest.layers, LayerSpec(name, "size", size))
    specs = tuple(s for s in specs if s.name != name or s.size == size)
    broken = replace(package, manifest=replace(package.manifest, layers=specs))
    with pytest.raises(EmulatorError, match=got):
        broken.build(CPU, torch.float32)


def test_a_manifest_says_what_a_module_must_know_of_its_fewer_heads() -> None:
    package = packed("gpt2", "heads")
    sizes = {s.name: s.size for s in package.manifest.layers if s.kind == "size"}
    assert sizes["transformer.h.1.attn.split_size"] == 16
    built: Any = package.build(CPU, torch.float32)
    assert [block.attn.split_size for block in built.transformer.h] == [32, 16, 16, 32]


def test_rounding_is_the_same_for_every_holder() -> None:
    first, second = packed("llama", "int4"), packed("llama", "int4")
    assert first.parts == second.parts
    tensors = {n: t for part in first.parts.values() for n, t in load(part).items()}
    codes = tensors["model.layers.2.mlp.up_proj.few_bits.codes"]
    assert codes.dtype == torch.uint8
    assert np.unique(codes.numpy()).size > 16
