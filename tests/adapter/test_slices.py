"""What a narrower network has of an adapter, and that it is exactly that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeat.adapter.slices import Pieces, Slice, common, filled_in, sliced, slices_of
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.emulator.heads import leave_out_heads
from fedpeat.emulator.narrowing import Narrowed
from fedpeat.emulator.width import leave_out_neurons
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.layers import matrix_of
from tiny import random_ids, tiny_model

BLOCKS = [0, 1, 2]
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def at(axis: int, *indices: int) -> Slice:
    return Slice(axis, np.array(indices))


def noise(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(1, 0.5, s).astype(np.float32) for name, s in shapes.items()}


# --- in a network -----------------------------------------------------------------------------


def narrower(kind: str) -> tuple[Any, Any, Narrowed]:
    """Return a full model, an emulator with half of its neurons and heads, and what it has."""
    model = tiny_model(kind, 3)
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, BLOCKS)
    ids = random_ids(2, 16)
    batches = [{"input_ids": ids, "labels": ids}]
    done = leave_out_neurons(small, blocks, BLOCKS, 0.5, batches)
    return model, small, done + leave_out_heads(small, blocks, BLOCKS, 0.5, batches)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    names = {key.rpartition(".")[0] for key in narrow_names(model)}
    return {name: matrix_of(model.get_submodule(name)).clone() for name in names}


def narrow_names(model: nn.Module) -> list[str]:
    return [f"{n}.x" for n, m in model.named_modules() if type(m).__name__ in {"Linear", "Conv1D"}]


CONFIGS = [
    AdapterConfig(placement="all", r=2),
    AdapterConfig(placement="all", r=2, use_rslora=True),
    AdapterConfig(placement="all", method="ia3"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "rslora", "ia3"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_narrow_network_is_changed_by_is_the_same_part_of_the_full_models_change(
    kind: str, config: AdapterConfig
) -> None:
    model, small, done = narrower(kind)
    blocks = find_blocks(model)
    before = {"full": matrices(model), "small": matrices(small)}
    full, device = (attach(m, blocks, BLOCKS, config) for m in (model, small))
    state = noise(full.shapes)
    full.load(state)
    device.load(sliced(state, slices_of(full.shapes, done.kept)))
    after = {"full": matrices(full.merged()), "small": matrices(device.merged())}
    changed = 0
    for name in before["full"]:
        rows, columns = (done.kept.get(f"{name}.{side}") for side in ("rows", "columns"))
        part = np.s_[list(rows) if rows else slice(None), :]
        other = np.s_[:, list(columns) if columns else slice(None)]
        if config.method == "ia3":  # it multiplies
            want = before["small"][name] * (after["full"][name] / before["full"][name])[part][other]
        else:
            want = before["small"][name] + (after["full"][name] - before["full"][name])[part][other]
        torch.testing.assert_close(after["small"][name], want, rtol=1e-4, atol=1e-5)
        changed += not torch.equal(before["small"][name], after["small"][name])
    assert changed >= {"lora": 12, "ia3": 6}[config.method]


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "rslora", "ia3"])
def test_what_a_narrow_network_learns_is_plugged_in_where_it_belongs(config: AdapterConfig) -> None:
    model, small, done = narrower("llama")
    blocks = find_blocks(model)
    full, device = (attach(m, blocks, BLOCKS, config) for m in (model, small))
    slices = slices_of(full.shapes, done.kept)
    start, learned = full.state(), noise(device.shapes)
    filled = filled_in(start, slices, learned)
    full.load(filled)
    for name, array in sliced(filled, slices).items():
        np.testing.assert_array_equal(array, learned[name])
    for name, part in slices.items():
        gone = np.setdiff1d(np.arange(start[name].shape[part.axis]), part.indices)
        assert len(gone) > 0
        other = Slice(part.axis, gone)
        np.testing.assert_array_equal(other.of(filled[name]), other.of(start[name]))
        assert "mlp" in name or "self_attn" in name


def test_without_its_adapter_on_narrow_layers_a_network_has_all_of_it() -> None:
    kept = {"model.layers.1.mlp.up_proj.rows": (0, 2)}
    shapes = {"model.layers.0.mlp.up_proj.lora_B.weight": (4, 2), "prompt_embeddings": (3, 8)}
    assert slices_of(shapes, kept) == {}


def tunable(method: Any, *, use_dora: bool) -> Tunable:
    config = AdapterConfig(placement="all", r=2, use_dora=use_dora, method=method)
    model = tiny_model("llama", 1)
    return attach(model, find_blocks(model), [0], config)


@pytest.mark.parametrize(
    ("method", "tensor"), [("lora", "lora_magnitude_vector"), ("none", "weight")]
)
def test_a_tensor_that_is_more_than_its_entries_is_refused(method: str, tensor: str) -> None:
    kept = {"model.layers.0.mlp.down_proj.columns": (0, 2)}
    with pytest.raises(AdapterError, match=rf"down_proj.{tensor} .* allowed there: lora without"):
        slices_of(tunable(method, use_dora=method == "lora").shapes, kept)


# --- entries worked by hand -------------------------------------------------------------------


def test_entries_are_taken_and_put_back_along_their_axis() -> None:
    slices = {"a": at(0, 0, 2), "b": at(1, 1)}
    own = sliced({"a": MATRIX, "b": MATRIX, "c": MATRIX}, slices)
    assert own["a"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert own["b"].tolist() == [[1], [5], [9]]
    assert own["c"].tolist() == MATRIX.tolist()
    filled = filled_in({"a": MATRIX, "b": MATRIX}, slices, {"b": -own["b"]})
    assert filled["b"].tolist() == [[0, -1, 2, 3], [4, -5, 6, 7], [8, -9, 10, 11]]
    assert filled["a"] is MATRIX
    assert MATRIX[0, 1] == 1


def test_pieces_of_an_adapter_make_it_up_again() -> None:
    adapter = {"a": MATRIX, "b": MATRIX + 100, "c": MATRIX}
    rungs = [{"a": at(1, 0, 2, 3), "b": at(0, 1)}, {"a": at(1, 2)}, {}]
    pieces = Pieces(adapter, rungs)
    cut = pieces.cut(adapter, {})
    assert sorted(array.shape for name, array in cut.items() if name[0] == "a") == [
        (3, 1),
        (3, 1),
        (3, 2),
    ]
    again = pieces.join(cut)
    assert list(again) == ["a", "b", "c"]
    for name, array in adapter.items():
        np.testing.assert_array_equal(again[name], array)


def test_a_rung_has_the_pieces_of_its_entries_and_no_others() -> None:
    adapter = {"a": MATRIX, "b": MATRIX}
    rungs = [{"a": at(1, 0, 2, 3)}, {"a": at(1, 2)}]
    pieces = Pieces(adapter, rungs)
    whole = pieces.cut(adapter, {})
    for own in rungs:
        part = pieces.cut(sliced(adapter, own), own)
        np.testing.assert_array_equal(part["b"], MATRIX)
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name])
        columns = sum(array.shape[1] for name, array in part.items() if name[0] == "a")
        assert columns == len(own["a"].indices)


def test_what_all_have_in_common_is_compared() -> None:
    slices: list[dict[str, Slice]] = [{"a": at(0, 0, 2)}, {}, {"a": at(0, 1, 2), "b": at(1, 3)}]
    states = [sliced({"a": MATRIX, "b": MATRIX}, own) for own in slices]
    for state in common(states, slices):
        assert state["a"].tolist() == [[8, 9, 10, 11]]
        assert state["b"].tolist() == [[3], [7], [11]]
