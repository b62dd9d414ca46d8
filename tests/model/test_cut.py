"""Taking blocks out of a network and putting them back (invariant 1)."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import BlockList, Blocks, find_blocks
from fedpeat.model.cut import (
    build_from_blocks,
    cut_in_place,
    only_blocks,
    required_blocks,
    skeleton,
)
from tiny import CONFIGS, random_ids, tiny_model


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
        theirs = dict(blocks.output(model, old).named_parameters())
        for name, parameter in blocks.output(small, new).named_parameters():
            assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropping_blocks_equals_skipping_them_in_the_full_model(kind: str) -> None:
    model, ids = tiny_model(kind), random_ids()
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, [0, 3, 5])
    kept = [blocks.output(model, i) for i in (0, 3, 5)]
    parent, _, name = blocks.paths.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
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
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "sliding_attention"] * 3
    small = build_from_blocks(model, find_blocks(model), [0, 2, 5]).config
    assert small.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert small.num_hidden_layers == 3
    assert (len(model.config.layer_types), model.config.num_hidden_layers) == (6, 6)


@pytest.mark.parametrize("kept", [[], [0, 6], [-1, 2], [3, 1], [2, 2]])
def test_indices_that_are_not_blocks_are_refused(kept: list[int]) -> None:
    model = tiny_model("llama")
    with pytest.raises(SplitError, match="rising indices below 6"):
        build_from_blocks(model, find_blocks(model), kept)


@pytest.mark.parametrize("kind", CONFIGS)
def test_network_is_whole_again_after_blocks_were_taken_out_for_a_while(kind: str) -> None:
    model, ids = tiny_model(kind), random_ids()
    before, settings = model(input_ids=ids).logits, model.config.to_dict()
    with only_blocks(model, find_blocks(model), [0, 3]):
        fewer = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(fewer, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config.to_dict() == settings


def test_taking_out_blocks_for_a_while_copies_no_weight() -> None:
    model = tiny_model("llama")
    weights = {id(p) for p in model.parameters()}
    with only_blocks(model, find_blocks(model), [0, 3]):
        assert {id(p) for p in model.parameters()} < weights


def test_list_without_any_block_left_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=3, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(
        SplitError, match=r"decoder.block must keep at least one block, got \[0, 1\]"
    ):
        build_from_blocks(model, find_blocks(model), [0, 1])


def test_skeleton_allocates_only_the_blocks_that_are_kept() -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    settings = model.config.to_dict()
    empty = skeleton("LlamaForCausalLM", settings, blocks, [0, 5], torch.bfloat16)
    small = build_from_blocks(model, blocks, [0, 5])
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }
    assert {(p.dtype, p.is_meta) for p in empty.parameters()} == {(torch.bfloat16, False)}


@pytest.mark.parametrize("name", ["NoSuchModel", "LlamaConfig", "pipeline"])
def test_skeleton_of_what_is_no_network_of_transformers_is_refused(name: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(SplitError, match=f"transformers has no network '{name}'"):
        skeleton(name, model.config.to_dict(), find_blocks(model), [0], torch.float32)


# --- blocks that nothing can stand in for --------------------------------------------------------


class Chain(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_of_one_kind_can_all_be_dropped() -> None:
    model = tiny_model("llama")
    assert required_blocks(model, find_blocks(model)) == []


def test_the_only_block_of_its_kind_is_required() -> None:
    chain = Chain([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
    assert required_blocks(chain, find_blocks(chain)) == [2]


def test_first_block_of_t5_is_required_in_both_halves() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=4, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    assert required_blocks(model, find_blocks(model)) == [0, 3]


def test_blocks_with_weights_in_common_are_required() -> None:
    shared = nn.Linear(2, 2)
    chain = Chain([nn.Linear(2, 2), shared, nn.Linear(2, 2), shared])
    assert required_blocks(chain, find_blocks(chain)) == [1, 3]


def test_block_that_changes_the_shape_is_required() -> None:
    chain = Chain([nn.Linear(2, 2), nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    assert required_blocks(chain, find_blocks(chain)) == []
    assert required_blocks(chain, find_blocks(chain), {"x": torch.zeros(1, 2)}) == [1]


def test_block_that_is_labelled_alone_of_its_kind_is_required() -> None:
    model = tiny_model("qwen2")
    model.config.layer_types = ["sliding_attention"] * 4 + ["full_attention", "sliding_attention"]
    assert required_blocks(model, find_blocks(model)) == [4]


def test_names_that_are_all_different_are_no_kinds() -> None:
    model = tiny_model("qwen2")
    model.config.layer_types = [f"stage{i}" for i in range(6)]
    assert required_blocks(model, find_blocks(model)) == []


def test_kinds_of_the_other_half_of_an_encoder_decoder_are_not_looked_at() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=3, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    for half in (model.encoder, model.decoder):
        half.config.decoder_kinds = ["a", "b", "a"]
    assert required_blocks(model, find_blocks(model)) == [0, 3, 4, 5]


# --- what goes with blocks -----------------------------------------------------------------------


class Indexed(nn.Linear):
    """A block that knows where it stands, and has a table by place that all share."""

    def __init__(self, index: int, table: dict[int, str]) -> None:
        super().__init__(2, 2)
        self.layer_idx = index
        self.layer_dic = table


def test_indices_and_tables_by_index_follow_the_blocks() -> None:
    table = {1: "first", 2: "second", 4: "third"}
    chain = Chain([Indexed(i, table) for i in range(5)])
    undo = cut_in_place(chain, find_blocks(chain), [0, 2, 4])
    assert [block.layer_idx for block in chain.blocks] == [0, 1, 2]
    assert [block.layer_dic for block in chain.blocks] == [{1: "second", 2: "third"}] * 3
    undo()
    assert [block.layer_idx for block in chain.blocks] == [0, 1, 2, 3, 4]
    assert [block.layer_dic for block in chain.blocks] == [table] * 5


def test_settings_of_stages_stay_when_a_stage_has_as_many_blocks() -> None:
    config = transformers.CvtConfig(depth=(1, 2, 3), embed_dim=(8, 16, 24), num_heads=(1, 2, 2))
    model = transformers.CvtModel(config)
    with only_blocks(model, find_blocks(model), [0, 1, 3, 5]):
        assert list(model.config.embed_dim) == [8, 16, 24]
        last = model.get_submodule("encoder.stages.2.layers")
        assert len(list(last.children())) == 2


def test_groups_that_have_weights_of_their_own_are_cut_like_blocks() -> None:
    config = transformers.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2,
        num_hidden_layers=4, num_hidden_groups=4,
    )  # fmt: skip
    model = transformers.AlbertModel(config).eval()
    with only_blocks(model, find_blocks(model), [0, 3]):
        assert (model.config.num_hidden_groups, model.config.num_hidden_layers) == (2, 2)
        assert model(input_ids=torch.ones(1, 4, dtype=torch.int64))[0].isfinite().all()


def test_indices_of_some_blocks_follow_them() -> None:
    model = tiny_model("llama")
    model.config.cross_attention_layers = [1, 4]
    small = build_from_blocks(model, find_blocks(model), [0, 4, 5])
    assert small.config.cross_attention_layers == [1]


def test_one_half_of_an_encoder_decoder_is_cut_and_the_other_stays() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_decoder_layers=4, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    small = build_from_blocks(model, find_blocks(model, cut="encoder"), [0, 3])
    assert (len(small.encoder.block), len(small.decoder.block)) == (2, 4)
    assert (small.encoder.config.num_layers, small.decoder.config.num_layers) == (2, 4)


def test_skeleton_has_room_for_buffers_made_of_weights() -> None:
    config = transformers.IBertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    blocks = Blocks((BlockList(("ibert.encoder.layer",), 3),))
    model = skeleton("IBertForMaskedLM", config.to_dict(), blocks, [0, 2], torch.float32)
    assert not any(t.is_meta for t in model.state_dict().values())


def test_blocks_in_lists_side_by_side_go_together() -> None:
    config = transformers.XLMConfig(vocab_size=32, emb_dim=8, n_layers=4, n_heads=2)
    model = transformers.XLMModel(config)
    with only_blocks(model, find_blocks(model), [0, 3]):
        assert (len(model.attentions), len(model.ffns)) == (2, 2)


def test_network_is_whole_again_after_an_error() -> None:
    model = tiny_model("llama")
    with pytest.raises(KeyError), only_blocks(model, find_blocks(model), [0, 3]):
        raise KeyError
    assert find_blocks(model).num_blocks == model.config.num_hidden_layers == 6


def test_block_index_and_weights_are_back_after_blocks_were_taken_out_for_a_while() -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    with only_blocks(model, blocks, [0, 3]):
        assert model.model.layers[1].self_attn.layer_idx == 1
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4, 5]


def test_tables_with_a_part_for_each_block_are_cut() -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=32, vocab_size_per_layer_input=32, hidden_size=8, intermediate_size=8,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        hidden_size_per_layer_input=2, num_kv_shared_layers=0, laurel_rank=2,
        layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = transformers.Gemma3nTextModel(config)
    whole = model.embed_tokens_per_layer.weight.detach().clone()
    with only_blocks(model, find_blocks(model), [0, 2]):
        cut = model.embed_tokens_per_layer.weight
        assert torch.equal(cut, whole[:, [0, 1, 4, 5]])
    assert torch.equal(model.embed_tokens_per_layer.weight, whole)


def test_skeleton_keeps_ties_and_the_random_stream() -> None:
    model = tiny_model("gpt2")
    before = torch.get_rng_state()
    settings = model.config.to_dict()
    empty = skeleton("GPT2LMHeadModel", settings, find_blocks(model), [0, 5], torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert empty.get_parameter("lm_head.weight") is empty.get_parameter("transformer.wte.weight")


def test_what_two_lists_change_is_put_back_to_how_it_was() -> None:
    network = Chain([nn.Linear(2, 2) for _ in range(3)])
    network.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    network.num_blocks = 3  # type: ignore[assignment]
    blocks = Blocks((BlockList(("blocks",), 3), BlockList(("heads",), 2)))
    undo = cut_in_place(network, blocks, [0, 2, 3])  # 3 becomes 2, and as 2 is then heads, 1
    assert vars(network)["num_blocks"] == 1
    undo()
    assert vars(network)["num_blocks"] == 3


def test_built_network_is_frozen_whatever_the_full_one_is() -> None:
    model = tiny_model("llama").train().requires_grad_()
    small = build_from_blocks(model, find_blocks(model), [0, 5])
    assert not any(m.training for m in small.modules())
    assert not any(p.requires_grad for p in small.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
