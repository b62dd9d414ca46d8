"""Where an attacker starts from: the emulator itself, made whole again, or nothing."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.recovery import (
    as_plain_linear,
    from_scratch,
    misses_blocks,
    plain,
    random_network,
    reinserted,
    trainable,
)
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from tiny import CONFIGS, random_ids, tiny_model

CPU = torch.device("cpu")


def packed(kind: str = "llama", kept: tuple[int, ...] = (0, 2, 5)) -> EmulatorPackage:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, kept)
    return pack_emulator(
        small, model, blocks, kept, recipe="", dtype=torch.float32, parent_sha256=""
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
    whole, blocks = reinserted(package, CPU, 0), find_blocks(tiny_model(kind))
    original = tiny_model(kind)
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
    whole = reinserted(packed(), CPU, 0)
    assert [block.self_attn.layer_idx for block in whole.model.layers] == list(range(6))
    ids = random_ids()
    cached = whole(input_ids=ids, use_cache=True).logits.detach()
    torch.testing.assert_close(cached, logits(whole))


def test_copies_of_one_block_are_trained_apart() -> None:
    whole = reinserted(packed(), CPU, 0)
    assert len({p.data_ptr() for p in whole.parameters()}) == len(list(whole.parameters()))
    assert all(p.requires_grad for p in whole.parameters())


def t5(kept: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Return an encoder-decoder of four blocks each, and what re-insertion makes of some."""
    config = transformers.T5Config(
        vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_decoder_layers=4, num_heads=2
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, kept)
    package = pack_emulator(
        small, model, blocks, kept, recipe="", dtype=torch.float32, parent_sha256=""
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


class Stored(nn.Module):
    """A linear layer in int8 without any parameter."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (layer.weight.detach() / scale).round().to(torch.int8))
        bias = layer.bias.detach().clone() if layer.bias is not None else None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.float() * self.scale, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_layer_becomes_the_plain_one_that_does_the_same(*, bias: bool) -> None:
    stored = Stored(nn.Linear(5, 3, bias=bias))
    linear = as_plain_linear(stored)
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(linear(x), stored(x))
    assert (linear.bias is not None) == bias


def test_every_quantised_layer_of_a_network_becomes_plain_and_no_other() -> None:
    model = tiny_model("llama")
    before = logits(model)
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Stored(down)
    stored = logits(model)
    assert not torch.equal(stored, before)
    others = {n: id(m) for n, m in model.named_modules() if n != "model.layers.1.mlp.down_proj"}
    plain(model)
    torch.testing.assert_close(logits(model), stored, rtol=1e-4, atol=1e-4)
    assert {n: id(m) for n, m in model.named_modules() if n in others} == others
    weight = model.model.layers[1].mlp.down_proj.weight
    assert isinstance(weight, nn.Parameter)
    torch.testing.assert_close(weight, down.weight, rtol=0, atol=0.01)
