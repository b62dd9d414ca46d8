"""Finding blocks (invariant 9) and naming them."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from fedpeat.config.schema import Cut
from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import BlockList, Blocks, find_blocks
from tiny import CONFIGS, tiny_model

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
    assert blocks == Blocks((BlockList((BLOCK_PATHS[kind],), 6),))


def test_model_without_blocks_is_refused_with_what_was_found() -> None:
    with pytest.raises(SplitError, match="Sequential has no list of blocks to cut.*found: none"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


class Lists(nn.Module):
    """A network with lists of its own making."""

    def __init__(self, config: transformers.PretrainedConfig | None, **lists: nn.Module) -> None:
        super().__init__()
        if config is not None:
            self.config = config
        self.embed = nn.Linear(8, 8)
        for name, module in lists.items():
            setattr(self, name, module)


def linears(number: int, width: int = 2) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(number))


def test_list_inside_a_block_is_not_taken_for_the_blocks() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    mixture = Lists(
        config, blocks=nn.ModuleList(Lists(None, experts=linears(2, 8)) for _ in range(3))
    )
    assert find_blocks(mixture) == Blocks((BlockList(("blocks",), 3),))


def test_list_that_fits_neither_the_configuration_nor_most_of_the_model_is_refused() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    message = r"no list of blocks to cut: none is as long as .*; found: a \(3\), b \(5\)"
    with pytest.raises(SplitError, match=message):
        find_blocks(Lists(config, a=linears(3), b=linears(5)))


def test_list_as_long_as_the_configuration_says_comes_before_a_larger_one() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    found = find_blocks(Lists(config, experts=linears(3, 16), layers=linears(2)))
    assert found == Blocks((BlockList(("layers",), 2),))


def test_plain_network_with_a_sequential_is_cut_there() -> None:
    body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert find_blocks(Lists(None, body=body)) == Blocks((BlockList(("body",), 2),))


def test_lists_side_by_side_make_up_the_blocks_together() -> None:
    found = find_blocks(Lists(None, attentions=linears(3), ffns=linears(3, 4)))
    assert found == Blocks((BlockList(("attentions", "ffns"), 3),))
    assert found.names(1) == ("attentions.1", "ffns.1")


def test_stages_of_different_width_are_cut_inside() -> None:
    stages = nn.ModuleList(linears(2 + i, 2 + i) for i in range(3))
    found = find_blocks(Lists(None, stages=stages))
    lists = tuple(BlockList((f"stages.{i}",), 2 + i) for i in range(3))
    assert found == Blocks(lists)
    assert found.names(3) == ("stages.1.1",)


def test_named_list_is_taken() -> None:
    network = Lists(None, a=linears(2), b=linears(5, 4))
    assert find_blocks(network, "a") == Blocks((BlockList(("a",), 2),))


@pytest.mark.parametrize("path", ["c", "embed"])
def test_name_of_no_list_is_refused_with_those_that_there_are(path: str) -> None:
    network = Lists(None, a=linears(2), b=linears(5, 4))
    with pytest.raises(SplitError, match=rf"{path} must be a ModuleList .*found: a \(2\), b \(5\)"):
        find_blocks(network, path)


def test_rename_moves_names_and_leaves_out_dropped_blocks() -> None:
    names = [
        "model.layers.4.mlp.weight",
        "model.layers.14.mlp.weight",
        "model.layers.2.mlp.weight",
        "model.norm.weight",
    ]
    full = Blocks((BlockList(("model.layers",), 20),))
    assert full.rename(names, full.select([4, 14]), {4: 0, 14: 1}) == {
        "model.layers.4.mlp.weight": "model.layers.0.mlp.weight",
        "model.layers.14.mlp.weight": "model.layers.1.mlp.weight",
        "model.norm.weight": "model.norm.weight",
    }


def test_rename_does_not_touch_lists_inside_a_block() -> None:
    names = ["h.1.experts.3.weight"]
    full = Blocks((BlockList(("h",), 4),))
    assert full.rename(names, full, {1: 0}) == {"h.1.experts.3.weight": "h.0.experts.3.weight"}


def test_only_the_text_part_of_what_also_sees_is_looked_at() -> None:
    model = tiny_model("llama")
    model.vision = linears(6, 256)
    assert find_blocks(model) == Blocks((BlockList(("model.layers",), 6),))


def test_one_block_that_runs_over_and_over_is_refused() -> None:
    config = transformers.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2,
        num_hidden_layers=4,
    )  # fmt: skip
    message = "AlbertModel runs the one block in encoder.albert_layer_groups 4 times over"
    with pytest.raises(SplitError, match=message):
        find_blocks(transformers.AlbertModel(config))


def test_two_blocks_of_two_kinds_are_no_stages() -> None:
    decoder = encoder_decoder("t5").get_decoder()
    assert decoder.block[0].state_dict().keys() != decoder.block[1].state_dict().keys()
    assert find_blocks(decoder) == Blocks((BlockList(("block",), 2),))


def test_stages_of_one_width_that_are_bare_lists_are_cut_inside() -> None:
    stages = nn.ModuleList(linears(2) for _ in range(3))
    found = find_blocks(Lists(None, stages=stages))
    assert found == Blocks(tuple(BlockList((f"stages.{i}",), 2) for i in range(3)))


def test_list_as_long_as_the_text_is_deep_comes_before_a_larger_one_of_what_else_it_takes() -> None:
    model = tiny_model("llama")
    model.config.audio_layers = 4
    model.model.audio = linears(4, 256)
    assert find_blocks(model) == Blocks((BlockList(("model.layers",), 6),))


# --- halves of an encoder-decoder ----------------------------------------------------------------


def encoder_decoder(kind: str) -> transformers.PreTrainedModel:
    """Return one with three blocks before the two that write."""
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=32,
                d_model=8,
                d_kv=4,
                d_ff=8,
                num_layers=3,
                num_decoder_layers=2,
                num_heads=2,
            )
        )
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=32,
            d_model=8,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=16,
        )
    )


HALVES = {
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "bart": {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
}


@pytest.mark.parametrize("kind", HALVES)
def test_both_halves_of_an_encoder_decoder_are_cut_unless_one_is_named(kind: str) -> None:
    model, paths = encoder_decoder(kind), HALVES[kind]
    encoder, decoder = BlockList((paths["encoder"],), 3), BlockList((paths["decoder"],), 2)
    assert find_blocks(model) == Blocks((encoder, decoder))
    assert find_blocks(model, cut="encoder") == Blocks((encoder,))
    assert find_blocks(model, cut="decoder") == Blocks((decoder,))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_that_a_network_does_not_have_is_refused(half: Cut) -> None:
    message = f"LlamaForCausalLM has no {half} to cut by itself; model.cut must be both, got {half}"
    with pytest.raises(SplitError, match=message):
        find_blocks(tiny_model("llama"), cut=half)


def test_tensors_of_every_list_and_part_are_located_and_renamed() -> None:
    full = Blocks((BlockList(("a", "b"), 3), BlockList(("c",), 2)))
    inside = {"a.1.w": 1, "b.2.w": 2, "c.1.w": 4, "x.c.0.w": 3}
    assert {name: full.locate(name) for name in inside} == inside
    assert [full.locate(name) for name in ("c.norm", "ca.1.w", "a.1_norm.w")] == [None] * 3
    names = ["a.2.w", "b.2.a.0.w", "c.1.w", "c.0.w", "norm"]
    assert full.rename(names, full.select([2, 4]), {2: 0, 4: 1}) == {
        "a.2.w": "a.0.w",
        "b.2.a.0.w": "b.0.a.0.w",
        "c.1.w": "c.0.w",
        "norm": "norm",
    }
