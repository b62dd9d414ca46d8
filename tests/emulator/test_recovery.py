"""Where an attacker starts from: the emulator itself, made whole again, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeat.emulator.few_bits import store_in_few_bits
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.recovery import (
    from_scratch,
    misses_blocks,
    random_network,
    reinserted,
    trainable,
)
from fedpeat.emulator.width import leave_out_neurons
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.layers import LayerKind
from tiny import CONFIGS, random_ids, tiny_model

CPU = torch.device("cpu")


def packed(kind: str = "llama", kept: tuple[int, ...] = (0, 2, 5)) -> EmulatorPackage:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, kept)
    return pack_emulator(
        small, model, blocks, kept, layers=(), recipe="", dtype=torch.float32, parent_sha256=""
    )


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=random_ids(), use_cache=False).logits
    return found.detach()


@pytest.mark.parametrize("kind", CONFIGS)
def test_with_every_block_kept_nothing_is_missing_and_the_model_is_back(kind: str) -> None:
    package = packed(kind, tuple(range(6)))
    assert not misses_blocks(package)
    assert torch.equal(logits(reinserted(package, CPU, 0)), logits(tiny_model(kind)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_a_missing_block_is_a_copy_of_the_nearest_kept_one(kind: str) -> None:
    package = packed(kind)
    assert misses_blocks(package)
    whole: Any = reinserted(package, CPU, 0)
    original: Any = tiny_model(kind)
    blocks = find_blocks(original)
    for index, nearest in enumerate([0, 0, 2, 2, 5, 5]):
        pairs = zip(
            blocks.output(whole, index).parameters(),
            blocks.output(original, nearest).parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs), index
    outside = [n for n, _ in original.named_parameters() if blocks.locate(n) is None]
    assert all(torch.equal(whole.get_parameter(n), original.get_parameter(n)) for n in outside)


def test_each_block_knows_its_own_place_so_that_a_cache_works() -> None:
    whole: Any = reinserted(packed(), CPU, 0)
    assert [block.self_attn.layer_idx for block in whole.model.layers] == list(range(6))
    ids = random_ids()
    cached = whole(input_ids=ids, use_cache=True).logits.detach()
    torch.testing.assert_close(cached, logits(whole))


def test_copies_of_one_block_are_trained_apart() -> None:
    whole: Any = reinserted(packed(), CPU, 0)
    assert len({p.data_ptr() for p in whole.parameters()}) == len(list(whole.parameters()))
    assert all(p.requires_grad for p in whole.parameters())


def t5(kept: tuple[int, ...]) -> tuple[Any, Any]:
    """Return an encoder-decoder of four blocks each, and what re-insertion makes of some."""
    config = transformers.T5Config(
        vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_decoder_layers=4, num_heads=2
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, kept)
    package = pack_emulator(
        small, model, blocks, kept, layers=(), recipe="", dtype=torch.float32, parent_sha256=""
    )
    return model, reinserted(package, CPU, 0)


def same_query(model: nn.Module, whole: nn.Module, index: int, source: int) -> bool:
    weight, blocks = "layer.0.SelfAttention.q.weight", find_blocks(model)
    one = blocks.output(whole, index).get_parameter(weight)
    return torch.equal(one, blocks.output(model, source).get_parameter(weight))


def test_a_block_of_the_encoder_never_stands_in_the_decoder() -> None:
    model, whole = t5((0, 3, 4, 7))
    # of each half the first block, which computes the position bias, is of a kind of its own
    expected = [0, 3, 3, 3, 4, 7, 7, 7]
    assert all(same_query(model, whole, i, source) for i, source in enumerate(expected))


def test_a_block_of_a_kind_of_which_none_is_kept_stays_random() -> None:
    model, whole = t5((1, 3, 4, 7))
    assert not any(same_query(model, whole, 0, source) for source in range(8))
    assert same_query(model, whole, 2, 1)


def test_random_networks_are_those_of_their_seed_and_leave_the_random_state() -> None:
    package = packed()
    before = torch.random.get_rng_state()
    one, same, other = (random_network(package, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))
    scratch, emulator = from_scratch(package, CPU, 1), trainable(package, CPU)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (scratch, emulator)]
    assert shapes[0] == shapes[1]
    held = {t.numpy().tobytes() for t in emulator.state_dict().values() if t.ndim > 1}
    assert not held & {t.numpy().tobytes() for t in scratch.state_dict().values()}


def in_few_bits(kind: str, bits: LayerKind) -> EmulatorPackage:
    model = tiny_model(kind)
    blocks, kept = find_blocks(model), (0, 2, 5)
    small = build_from_blocks(model, blocks, kept)
    layers = store_in_few_bits(small, bits)
    return pack_emulator(
        small, model, blocks, kept, layers=layers, recipe="", dtype=torch.float32, parent_sha256=""
    )


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])  # gemma scales its embeddings
def test_an_emulator_in_few_bits_is_trained_in_plain_layers_that_do_the_same(
    kind: str, bits: LayerKind
) -> None:
    package = in_few_bits(kind, bits)
    stored = logits(package.build(CPU, torch.float32))
    model = trainable(package, CPU)
    torch.testing.assert_close(logits(model), stored, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == package.manifest.num_parameters
    kept, original = (
        model.state_dict(),
        build_from_blocks(tiny_model(kind), find_blocks(tiny_model(kind)), (0, 2, 5)),
    )
    assert kept.keys() == original.state_dict().keys()
    assert {type(m) for m in model.modules()} == {type(m) for m in original.modules()}
    model(input_ids=random_ids(), labels=random_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_missing_blocks_of_an_emulator_in_few_bits_are_put_back_as_plain_layers() -> None:
    whole: Any = reinserted(in_few_bits("llama", "int8"), CPU, 0)
    original: Any = tiny_model("llama")
    assert whole.state_dict().keys() == original.state_dict().keys()
    for index, nearest in enumerate([0, 0, 2, 2, 5, 5]):
        weight = whole.model.layers[index].mlp.up_proj.weight
        torch.testing.assert_close(
            weight, original.model.layers[nearest].mlp.up_proj.weight, rtol=0, atol=0.01
        )
    embedding = whole.model.embed_tokens.weight
    torch.testing.assert_close(embedding, original.model.embed_tokens.weight, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_missing_blocks_of_a_narrower_emulator_are_as_narrow_as_the_kept_ones(kind: str) -> None:
    model = tiny_model(kind)
    blocks, kept = find_blocks(model), (0, 2, 5)
    small = build_from_blocks(model, blocks, kept)
    batch = {"input_ids": random_ids(), "labels": random_ids()}
    layers = leave_out_neurons(small, blocks.select(kept), [1], 0.5, [batch]).layers
    package = pack_emulator(
        small, model, blocks, kept, layers=layers, recipe="", dtype=torch.float32, parent_sha256=""
    )
    assert torch.equal(logits(trainable(package, CPU)), logits(small))
    whole, scratch = reinserted(package, CPU, 0), from_scratch(package, CPU, 0)
    sizes = [sum(p.numel() for p in blocks.output(whole, i).parameters()) for i in range(6)]
    assert sizes[0] == sizes[1] == sizes[4] == sizes[5] > sizes[2] == sizes[3]
    assert torch.isfinite(logits(whole)).all()
    assert torch.isfinite(logits(scratch)).all()
