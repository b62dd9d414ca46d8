"""Neurons are found by calls, left out exactly, and made good by those that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.narrowing import through
from fedpeat.emulator.width import fit_outgoing, leave_out_neurons, neuron_scores, neurons_of
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from tiny import CONFIGS, TINY, VOCAB_SIZE, random_ids, tiny_model

FEED_FORWARD = {
    "gpt2": ("mlp.c_fc", "mlp.c_proj", 128),
    "opt": ("fc1", "fc2", 64),
    "bloom": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", 128),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", 64),
    "phi": ("mlp.fc1", "mlp.fc2", 64),
}
GATED = ("mlp.gate_proj mlp.up_proj", "mlp.down_proj", 64)


def calibration() -> Batch:
    ids = random_ids(1, 16)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_neurons_of_a_block_are_those_of_its_feed_forward_network(kind: str) -> None:
    model = tiny_model(kind, 3)
    blocks = find_blocks(model)
    (neurons,) = neurons_of(model, blocks, 1, calibration())
    before, after, number = FEED_FORWARD.get(kind, GATED)
    (prefix,) = blocks.names(1)
    assert neurons.before == tuple(f"{prefix}.{name}" for name in before.split())
    assert (neurons.after, neurons.number) == (f"{prefix}.{after}", number)


def test_gate_and_value_made_by_one_layer_lose_the_same_neurons() -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    settings: Any = {**TINY, **tokens, "intermediate_size": 64, "num_hidden_layers": 3}
    with torch.random.fork_rng():
        model: Any = transformers.Phi3ForCausalLM(transformers.Phi3Config(**settings)).eval()
    model.requires_grad_(False)
    done = leave_out_neurons(model, find_blocks(model), [1], 0.5, [calibration()])
    assert [(s.name.rpartition(".")[2], s.size) for s in done.layers] == [
        ("gate_up_proj", 64),
        ("down_proj", 32),
    ]
    assert model(**calibration()).logits.shape == (1, 16, VOCAB_SIZE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_keeping_every_neuron_changes_nothing(kind: str) -> None:
    model = tiny_model(kind, 3)
    small = build_from_blocks(model, find_blocks(model), [0, 1, 2])
    leave_out_neurons(small, find_blocks(small), [1], 1.0, [calibration()])
    want, got = (m(**calibration()).logits for m in (model, small))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_neurons_that_do_nothing_are_left_out_first_and_exactly() -> None:
    model: Any = tiny_model("gpt2", 3)
    layer = model.transformer.h[1].mlp.c_proj
    layer.weight[::2] = 0  # every second neuron counts for nothing
    small: Any = build_from_blocks(model, find_blocks(model), [0, 1, 2])
    leave_out_neurons(small, find_blocks(small), [1], 0.5, [calibration()])
    kept, all_of_them = small.transformer.h[1].mlp, model.transformer.h[1].mlp
    assert torch.equal(kept.c_fc.weight, all_of_them.c_fc.weight[:, 1::2])
    assert torch.equal(kept.c_fc.bias, all_of_them.c_fc.bias[1::2])
    assert torch.equal(kept.c_proj.bias, all_of_them.c_proj.bias)
    want, got = (m(**calibration()).logits for m in (model, small))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_scores_worked_by_hand() -> None:
    outgoing = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    moment = torch.tensor([[2.0, 9.0], [9.0, 10.0]])
    torch.testing.assert_close(neuron_scores(outgoing, moment), torch.tensor([50.0, 10.0]))


def test_a_neuron_that_is_left_takes_over_from_its_twin() -> None:
    activations = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0]])  # the first two are alike
    moment = activations.T @ activations / 2
    outgoing = torch.tensor([[5.0, 7.0, 1.0]])
    fitted = fit_outgoing(outgoing, moment, torch.tensor([0, 2]))
    torch.testing.assert_close(fitted, torch.tensor([[12.0, 1.0]]), rtol=1e-2, atol=1e-2)


def test_neurons_that_are_never_active_are_left_as_they_are() -> None:
    outgoing = torch.tensor([[5.0, 7.0]])
    assert torch.equal(
        fit_outgoing(outgoing, torch.zeros(2, 2), torch.tensor([1])), torch.tensor([[7.0]])
    )


def test_what_is_left_after_two_cuts_is_counted_in_the_larger_network() -> None:
    first = {"a.rows": (1, 3, 5, 7), "b.rows": (0,)}
    left = {"a.rows": (1, 5), "b.rows": (0,), "c.columns": (4,)}
    assert through(first, {"a.rows": (0, 2), "c.columns": (4,)}) == left


class Mixed(nn.Module):
    """A block whose hidden states are normalised, so that no neuron can go alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = value + self.down(self.norm(self.up(value)))
        return result


def test_neurons_that_others_depend_on_are_no_neurons() -> None:
    model = nn.Sequential(nn.Sequential(Mixed(), Mixed()))
    blocks = find_blocks(model, "0")
    assert neurons_of(model, blocks, 0, {"input": torch.randn(2, 3, 8)}) == []


class Averaged(nn.Module):
    """A block that divides by the number of its neurons, so that fewer of them count more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.up(value).relu()
        result: Tensor = value + self.down(hidden / hidden.shape[-1])
        return result


def test_neurons_whose_number_matters_are_no_neurons() -> None:
    first = Averaged()
    nn.init.normal_(first.down.weight, std=1e-4)  # so little that no fixed tolerance sees it
    model = nn.Sequential(nn.Sequential(first, Averaged()))
    blocks = find_blocks(model, "0")
    assert neurons_of(model, blocks, 0, {"input": torch.randn(2, 3, 8)}) == []


def test_blocks_without_neurons_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(Mixed(), Mixed()))
    with pytest.raises(
        EmulatorError, match="finds no neurons in the 1 kept blocks .* dropping blocks would"
    ):
        leave_out_neurons(
            model, find_blocks(model, "0"), [0], 0.5, [{"input": torch.ones(1, 3, 8)}]
        )


def test_width_without_text_is_refused() -> None:
    model = tiny_model("llama", 3)
    with pytest.raises(EmulatorError, match="width looks at text .* data.server_ratio"):
        leave_out_neurons(model, find_blocks(model), [1], 0.5, [])
