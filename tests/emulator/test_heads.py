"""Attention heads are found by calls, left out exactly, and made good by those that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.heads import heads_of, leave_out_heads
from fedpeat.emulator.narrowing import Narrowed
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks, frozen
from fedpeat.model.layers import matrix_of
from tiny import CONFIGS, TINY, random_ids, tiny_model, tiny_vit

SEPARATE = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
FOUND = {
    "gpt2": ("attn.c_attn", "attn.c_proj", 4),
    "opt": ("self_attn.k_proj self_attn.v_proj self_attn.q_proj", "self_attn.out_proj", 4),
    "bloom": ("self_attention.query_key_value", "self_attention.dense", 4),
    "gpt_neox": ("attention.query_key_value", "attention.dense", 4),
    "phi": (SEPARATE, "self_attn.dense", 4),
}
GROUPED = (SEPARATE, "self_attn.o_proj", 2)  # four heads, two of which share keys and values
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def calibration() -> Batch:
    ids = random_ids(2, 16)
    return {"input_ids": ids, "labels": ids}


def pictures() -> Batch:
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def made(kind: str, **settings: Any) -> Any:
    """Return a random network of a class that is no causal model, or has settings of its own."""
    all_settings = {**TINY, **SPECIAL, "intermediate_size": 64, "num_hidden_layers": 3}
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config(**{**all_settings, **settings}))
        for matrix in [p for p in model.parameters() if p.ndim > 1]:
            nn.init.normal_(matrix, std=0.2)
    return frozen(model, torch.device("cpu"))


def without(model: Any, ratio: float = 0.5, batch: Batch | None = None) -> tuple[Any, Narrowed]:
    """Return a copy whose block 1 has a share of its heads, and what was done."""
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, [0, 1, 2])
    return small, leave_out_heads(small, blocks, [1], ratio, [batch or calibration()])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_heads_of_a_block_are_those_of_its_attention(kind: str) -> None:
    model = tiny_model(kind, 3)
    blocks = find_blocks(model)
    best, *others = heads_of(model, blocks, 1, calibration())
    before, after, number = FOUND.get(kind, GROUPED)
    (prefix,) = blocks.names(1)
    assert list(best.rows) == [f"{prefix}.{name}" for name in before.split()]
    assert (best.after, best.number) == (f"{prefix}.{after}", number)
    assert {heads.after for heads in others} <= {best.after}  # neurons are no heads


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (made("BertForMaskedLM"), calibration()),
        (made("RobertaForMaskedLM"), calibration()),
        (made("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8), calibration()),
        (tiny_vit(3), pictures()),
        *((tiny_model(kind, 3), calibration()) for kind in CONFIGS if kind != "bloom"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_heads_that_do_nothing_are_left_out_first_and_exactly(model: Any, batch: Batch) -> None:
    heads = heads_of(model, find_blocks(model), 1, batch)[0]
    layer = model.get_submodule(heads.after)
    matrix_of(layer)[:, heads.columns[::2].flatten()] = 0  # every second counts for nothing
    small, done = without(model, 0.5, batch)
    for name, rows in heads.rows.items():
        stay = tuple(sorted(rows[1::2].flatten().tolist()))
        assert done.kept[f"{name}.rows"] == stay
    assert done.kept[f"{heads.after}.columns"] == tuple(heads.columns[1::2].flatten().tolist())
    want, got = (m(**batch).logits for m in (model, small))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_keeping_every_head_changes_nothing(kind: str) -> None:
    model = tiny_model(kind, 3)
    small, _ = without(model, 1.0)
    want, got = (m(**calibration()).logits for m in (model, small))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_what_is_left_takes_over_from_a_twin() -> None:
    model: Any = tiny_model("opt", 3)
    attention = model.model.decoder.layers[1].self_attn
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.weight[8:16] = layer.weight[:8]  # the second head does what the first does
        layer.bias[8:16] = layer.bias[:8]
    attention.out_proj.weight[:, :16] *= 0.2  # so that one of the two is what matters least
    small, _ = without(model, 0.75)
    want, got = (m(**calibration()).logits for m in (model, small))
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    kept = small.model.decoder.layers[1].self_attn.out_proj.weight
    columns = attention.out_proj.weight
    torch.testing.assert_close(kept[:, :8], columns[:, :8] + columns[:, 8:16], rtol=0.1, atol=0.05)


def test_at_least_one_group_of_heads_stays() -> None:
    small, done = without(tiny_model("llama", 3), 0.01)
    sizes = [(s.name.rpartition(".")[2], s.size) for s in done.layers]
    assert sizes == [("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)]
    assert torch.isfinite(small(**calibration()).logits).all()


def test_heads_that_share_all_keys_are_left_out_alone_however_attention_is_computed() -> None:
    model = made("LlamaForCausalLM", num_key_value_heads=1)
    small, done = without(model)
    name = "model.layers.1.self_attn"
    assert [(s.name, s.kind, s.size) for s in done.layers] == [
        (f"{name}.q_proj", "fewer_outputs", 16),
        (f"{name}.o_proj", "fewer_inputs", 16),
        (f"{name}.num_key_value_groups", "size", 2),
    ]
    fused = small(**calibration()).logits
    small.set_attn_implementation("eager")
    torch.testing.assert_close(small(**calibration()).logits, fused, rtol=1e-3, atol=1e-3)


def test_the_way_attention_is_computed_stays_as_it_was() -> None:
    small, _ = without(tiny_model("llama", 3))
    assert small.config._attn_implementation == "sdpa"  # noqa: SLF001 - there is no public name


@pytest.mark.parametrize("kind", ["bloom", "Phi3ForCausalLM", "Olmo2ForCausalLM"])
def test_heads_that_the_network_around_them_counts_are_refused(kind: str) -> None:
    model = made(kind) if "For" in kind else tiny_model(kind, 3)
    before = model(**calibration()).logits
    with pytest.raises(EmulatorError, match=r"finds no attention heads that .* work without"):
        leave_out_heads(model, find_blocks(model), [1], 0.5, [calibration()])
    assert torch.equal(model(**calibration()).logits, before)  # and nothing was changed


def test_a_cache_of_keys_and_values_is_as_narrow_as_the_heads() -> None:
    small, _ = without(tiny_model("llama", 3))
    ids = random_ids(1, 6)
    outputs = small(input_ids=ids[:, :-1], use_cache=True)
    last = small(input_ids=ids[:, -1:], past_key_values=outputs.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, small(input_ids=ids).logits[:, -1], rtol=1e-3, atol=1e-3)


def test_heads_without_text_are_refused() -> None:
    model = tiny_model("llama", 3)
    with pytest.raises(EmulatorError, match=r"heads looks at text .* data.server_ratio"):
        leave_out_heads(model, find_blocks(model), [1], 0.5, [])
