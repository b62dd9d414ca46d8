"""Finding blocks, cutting and plugging back (invariants 1 and 9)."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import build_from_blocks, find_blocks, num_blocks_config, reindex
from tiny import CONFIGS, random_ids, tiny_model

BLOCK_PATHS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "gemma": "model.layers",
    "phi": "model.layers",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_block_list_is_found_in_every_architecture(kind: str) -> None:
    blocks = find_blocks(tiny_model(kind))
    assert (blocks.path, blocks.num_blocks) == (BLOCK_PATHS[kind], 6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_keeping_every_block_gives_the_same_logits_exactly(kind: str) -> None:
    model, ids = tiny_model(kind), random_ids()
    rebuilt = build_from_blocks(model, find_blocks(model), range(6))
    assert torch.equal(rebuilt(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_kept_blocks_are_the_named_ones_in_order(kind: str) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, [0, 3, 5])
    for new, old in enumerate([0, 3, 5]):
        theirs = dict(blocks.of(model)[old].named_parameters())
        for name, parameter in blocks.of(small)[new].named_parameters():
            assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropping_blocks_equals_skipping_them_in_the_full_model(kind: str) -> None:
    model, ids = tiny_model(kind), random_ids()
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, [0, 3, 5])
    kept = [blocks.of(model)[i] for i in (0, 3, 5)]
    parent = model.get_submodule(blocks.path.rpartition(".")[0])
    setattr(parent, blocks.path.rpartition(".")[2], nn.ModuleList(kept))
    model.config.num_hidden_layers = 3
    reference = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(
        small(input_ids=ids, use_cache=False).logits, reference, rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_do_not_depend_on_the_cache(kind: str) -> None:
    model = tiny_model(kind)
    small, ids = build_from_blocks(model, find_blocks(model), [1, 4]), random_ids()
    with_cache = small(input_ids=ids, use_cache=True).logits
    torch.testing.assert_close(
        small(input_ids=ids, use_cache=False).logits, with_cache, rtol=0, atol=0
    )


def test_building_leaves_the_random_stream_alone() -> None:
    model = tiny_model("llama")
    before = torch.get_rng_state()
    build_from_blocks(model, find_blocks(model), [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_small_model_shares_no_memory_with_the_full_one() -> None:
    model = tiny_model("gpt2")
    small = build_from_blocks(model, find_blocks(model), [0, 5])
    ours = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not ours & {t.untyped_storage().data_ptr() for t in small.state_dict().values()}


def test_settings_per_block_are_cut_with_the_blocks() -> None:
    config = tiny_model("qwen2").config
    config.layer_types = ["full_attention", "sliding_attention"] * 3
    small = num_blocks_config(config, 6, [0, 2, 5])
    assert small.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert small.num_hidden_layers == 3


def test_model_without_blocks_is_refused_with_what_was_found() -> None:
    with pytest.raises(SplitError, match="Sequential has no list of blocks to cut.*found: none"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_list_inside_a_block_is_not_taken_for_the_blocks() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.LlamaConfig(num_hidden_layers=2)
            block = [nn.Linear(2, 2), nn.Linear(2, 2)]
            self.blocks = nn.ModuleList(nn.ModuleList(block) for _ in range(3))

    with pytest.raises(SplitError, match=r"wanted a ModuleList of 2, found: blocks \(3\)"):
        find_blocks(Mixture())


@pytest.mark.parametrize("kept", [[], [0, 6], [-1, 2], [3, 1], [2, 2]])
def test_indices_that_are_not_blocks_are_refused(kept: list[int]) -> None:
    model = tiny_model("llama")
    with pytest.raises(SplitError, match="rising indices below 6"):
        build_from_blocks(model, find_blocks(model), kept)


def test_reindex_moves_names_and_leaves_out_dropped_blocks() -> None:
    names = [
        "model.layers.4.mlp.weight",
        "model.layers.14.mlp.weight",
        "model.layers.2.mlp.weight",
        "model.norm.weight",
    ]
    assert reindex(names, "model.layers", {4: 1, 14: 2}) == {
        "model.layers.4.mlp.weight": "model.layers.1.mlp.weight",
        "model.layers.14.mlp.weight": "model.layers.2.mlp.weight",
        "model.norm.weight": "model.norm.weight",
    }


def test_reindex_does_not_touch_lists_inside_a_block() -> None:
    names = ["h.1.experts.3.weight"]
    assert reindex(names, "h", {1: 0}) == {"h.1.experts.3.weight": "h.0.experts.3.weight"}
