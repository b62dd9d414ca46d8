"""Which blocks each choice keeps, on networks where the answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedpeat.config.recipe import Step
from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch, mean_loss_of
from fedpeat.emulator.cka import clusters_of_blocks, linear_cka
from fedpeat.emulator.greedy import removal_order
from fedpeat.emulator.influence import block_influence
from fedpeat.emulator.selection import SELECTIONS, choose_blocks, choose_rungs
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.model.cut import only_blocks
from tiny import random_ids, tiny_model

MIDDLE = [1, 2, 3, 4]


def batches() -> list[Batch]:
    return [{"input_ids": random_ids(seed=i), "labels": random_ids(seed=i)} for i in range(2)]


def with_idle_blocks(idle: list[int]) -> tuple[Any, Blocks]:
    """Return a model of six blocks, some of which add nothing to what passes through them."""
    model = tiny_model("llama")
    blocks = find_blocks(model)
    for index in idle:
        block: Any = blocks.output(model, index)
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.zeros_(layer.weight)
    return model, blocks


@pytest.mark.parametrize("idle", [[1, 3], [2, 4], [3, 4]])
def test_blocks_that_do_nothing_have_the_least_influence(idle: list[int]) -> None:
    model, blocks = with_idle_blocks(idle)
    kept = choose_blocks(Step("influence", 0.5), model, blocks, [0, 5], batches())
    assert kept == [i for i in range(6) if i not in idle]


def test_influence_of_a_block_that_does_nothing_is_zero() -> None:
    model, blocks = with_idle_blocks([3])
    influence = block_influence(model, blocks, MIDDLE, batches())
    assert influence[3] == pytest.approx(0, abs=1e-6)
    assert min(influence[i] for i in (1, 2, 4)) > 1e-3


def test_greedy_drops_first_the_block_without_which_the_loss_is_lowest() -> None:
    model, blocks = with_idle_blocks([])

    def loss_without(index: int) -> float:
        with only_blocks(model, blocks, [i for i in range(6) if i != index]):
            return float(mean_loss_of(model, batches()))

    order = removal_order(model, blocks, MIDDLE, 3, batches())
    assert order[0] == min(MIDDLE, key=loss_without)
    assert removal_order(model, blocks, MIDDLE, 2, batches()) == order[:2]


def test_clusters_are_neighbours_and_hold_every_candidate_once() -> None:
    model, blocks = with_idle_blocks([3])
    clusters = clusters_of_blocks(model, blocks, MIDDLE, 3, batches())
    assert list(itertools.chain(*clusters)) == MIDDLE
    assert [2, 3] in clusters  # block 3 puts out what block 2 did


def test_cka_is_one_for_rotated_and_scaled_states_and_small_for_unrelated_ones() -> None:
    states = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(other[:8]).Q
    assert linear_cka(states, 3 * states @ rotation + 1) == pytest.approx(1, abs=1e-5)
    assert linear_cka(states, other) < 0.01


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize(("ratio", "number"), [(0.25, 3), (0.5, 4), (0.74, 4), (1.0, 6)])
def test_every_choice_keeps_its_share_and_the_tuned_blocks(
    name: str, ratio: float, number: int
) -> None:
    model, blocks = with_idle_blocks([])
    kept = choose_blocks(Step(name, ratio), model, blocks, [0, 5], batches())
    assert kept == sorted(set(kept))
    assert len(kept) == number
    assert {0, 5} <= set(kept)


@pytest.mark.parametrize("name", SELECTIONS)
def test_both_halves_of_an_encoder_decoder_are_cut(name: str) -> None:
    config = transformers.T5Config(
        vocab_size=300,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=5,
        num_decoder_layers=5,
        num_heads=2,
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    kept = choose_blocks(Step(name, 0.5), model, find_blocks(model), [], batches())
    assert [sum(i < 5 for i in kept), sum(i >= 5 for i in kept)] == [3, 3]
    assert {0, 5} <= set(kept)  # they compute the position bias of all others


@pytest.mark.parametrize("name", SELECTIONS)
def test_choosing_leaves_the_model_as_it_was(name: str) -> None:
    model, blocks = with_idle_blocks([])
    ids = random_ids()
    before = model(input_ids=ids).logits
    model.train()
    choose_blocks(Step(name, 0.5), model, blocks, [0, 5], batches())
    assert all(module.training for module in model.modules())
    assert torch.equal(model.eval()(input_ids=ids).logits, before)


def test_a_choice_that_looks_at_text_is_refused_without_any() -> None:
    model, blocks = with_idle_blocks([])
    with pytest.raises(EmulatorError, match="greedy:0.5 looks at text of the server and got none"):
        choose_blocks(Step("greedy", 0.5), model, blocks, [0, 5], [])


def test_nothing_to_compress_is_refused() -> None:
    model, blocks = with_idle_blocks([])
    with pytest.raises(EmulatorError, match="no blocks to compress: 6 of 6 are tuned"):
        choose_blocks(Step("layer_drop", 0.5), model, blocks, range(6), [])


def test_share_that_drops_nothing_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(EmulatorError, match="layer_drop:0.5 leaves all 6, since it keeps one"):
        choose_blocks(Step("layer_drop", 0.5), model, find_blocks(model), [0, 1, 2, 3, 4], [])


@pytest.mark.parametrize(
    ("name", "refused"), [("influence", False), ("cka", True), ("layer_drop", False)]
)
def test_blocks_that_text_does_not_pass_through_have_no_states(name: str, *, refused: bool) -> None:
    config = transformers.MllamaTextConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=2, cross_attention_layers=[1, 3], pad_token_id=0,
    )  # fmt: skip
    model = transformers.MllamaForCausalLM(config).eval().requires_grad_(False)
    blocks, step = find_blocks(model), Step(name, 0.5)
    if refused:
        with pytest.raises(EmulatorError, match=r"cka compares .*; \[1, 3\] do not run for text"):
            choose_blocks(step, model, blocks, [0, 5], batches())
    else:
        assert len(choose_blocks(step, model, blocks, [0, 5], batches())) == 4


def test_loss_of_a_network_that_gives_none_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(EmulatorError, match="gives no loss for .*input_ids"):
        mean_loss_of(model, [{"input_ids": random_ids()}])


# --- ladders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTIONS)
def test_each_rung_has_some_of_the_blocks_of_the_one_above_it(name: str) -> None:
    model, blocks = with_idle_blocks([])
    steps = [Step(name, ratio) for ratio in (0.75, 0.5, 0.25)]
    large, medium, small = choose_rungs(steps, model, blocks, [0, 5], batches())
    assert [len(large), len(medium), len(small)] == [5, 4, 3]
    assert {0, 5} < set(small) < set(medium) < set(large)
    assert large == choose_blocks(steps[0], model, blocks, [0, 5], batches())
    assert model.config.num_hidden_layers == 6  # the network is whole again


def test_a_lower_rung_is_chosen_in_the_network_of_the_one_above_it() -> None:
    model, blocks = with_idle_blocks([2, 3])
    steps = [Step("influence", 0.75), Step("influence", 0.5)]
    large, medium = choose_rungs(steps, model, blocks, [0, 5], batches())
    assert set(range(6)) - set(medium) == {2, 3}
    with only_blocks(model, blocks, large):
        inner = blocks.select(large)
        scores = block_influence(model, inner, range(1, 4), batches())
    dropped = min(scores, key=scores.__getitem__)
    assert medium == [i for i in large if i != large[dropped]]


def test_a_rung_that_would_be_the_one_above_it_is_refused() -> None:
    model, blocks = with_idle_blocks([])
    steps = [Step("layer_drop", 0.5), Step("layer_drop", 0.5)]
    with pytest.raises(
        EmulatorError, match="layer_drop:0.5 keeps as many blocks as the rung above"
    ):
        choose_rungs(steps, model, blocks, [0, 5], [])
