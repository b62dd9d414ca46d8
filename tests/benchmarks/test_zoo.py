"""The zoo builds small networks of any architecture, which give a loss and a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import zoo
from zoo_sizes import CANNOT, MORE

SAMPLE = [
    ("bart", "causal_lm"),
    ("deepseek_v3", "causal_lm"),
    ("gemma3", "causal_lm"),
    ("gpt2", "causal_lm"),
    ("jamba", "causal_lm"),
    ("qwen3_next", "causal_lm"),
    ("reformer", "causal_lm"),
    ("bert", "masked_lm"),
    ("modernbert", "masked_lm"),
    ("electra", "sequence_classification"),
    ("t5gemma", "seq2seq_lm"),
    ("t5", "seq2seq_lm"),
    ("clip", "image_classification"),
    ("deit", "image_classification"),
    ("resnet", "image_classification"),
    ("siglip2", "image_classification"),
    ("vit", "image_classification"),
]


@pytest.mark.parametrize(("model_type", "family"), SAMPLE)
def test_a_small_network_has_a_finite_loss_and_a_gradient(model_type: str, family: str) -> None:
    model = zoo.build(model_type, family)

    loss = zoo.loss_of(model, zoo.tiny_batch(model))
    loss.backward()

    assert loss.ndim == 0
    assert loss.isfinite()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize(("model_type", "family"), SAMPLE)
def test_a_small_network_takes_less_than_5_mib(model_type: str, family: str) -> None:
    model = zoo.build(model_type, family)

    assert sum(p.nbytes for p in model.parameters()) < 5 * 2**20


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("jamba", {"linear_attention", "full_attention"}),
        ("lfm2", {"conv", "full_attention"}),
        ("nemotron_h", {"linear_attention", "moe", "mlp", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("zamba2", {"linear_attention", "hybrid"}),
    ],
)
def test_six_blocks_show_every_kind_of_block(model_type: str, kinds: set[str]) -> None:
    config = zoo.tiny_config(model_type, "causal_lm")

    assert len(config.layer_types) == config.num_hidden_layers == 6
    assert set(config.layer_types) == kinds


def test_parts_of_a_network_are_small_too() -> None:
    config = zoo.tiny_config("gemma3", "causal_lm")

    assert config.text_config.num_hidden_layers == 6
    assert config.vision_config.num_hidden_layers == 4
    assert config.vision_config.hidden_size == 64


def test_the_seed_chooses_the_weights() -> None:
    first, again, other = (
        torch.cat([p.flatten() for p in zoo.build("llama", "causal_lm", seed).parameters()])
        for seed in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_callers_random_stream_is_left_alone() -> None:
    before = torch.get_rng_state()

    zoo.tiny_batch(zoo.build("resnet", "image_classification"))

    assert torch.equal(torch.get_rng_state(), before)


def test_the_answer_of_a_deep_network_with_batch_norms_does_not_fade_to_zero() -> None:
    model = zoo.build("mobilenet_v2", "image_classification")
    pixels = zoo.tiny_batch(model)["pixel_values"]

    assert model(pixel_values=pixels).logits.std() > 0.01


@pytest.mark.parametrize(
    ("model_type", "family", "said"),
    [
        ("no-such-network", "causal_lm", "transformers has no causal_lm of type 'no-such-network'"),
        ("bert", "no-such-family", "family must be one of causal_lm, .*, got 'no-such-family'"),
        ("gemma3n", "causal_lm", "gemma3n: needs the packages timm and pillow"),
        ("pp_lcnet", "image_classification", "pp_lcnet: has no loss"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(
    model_type: str, family: str, said: str
) -> None:
    with pytest.raises(zoo.ZooError, match=f"^{said}$"):
        zoo.build(model_type, family)


def test_an_error_of_an_architecture_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MORE, "llama", {"num_attention_heads": 5})

    with pytest.raises(
        zoo.ZooError, match=r"^llama: no configuration: [^\n]*not a multiple"
    ) as told:
        zoo.build("llama", "causal_lm")

    assert "\n" not in str(told.value)


def test_only_known_architectures_are_listed_as_impossible() -> None:
    known = {name for family in zoo.FAMILIES.values() for name in family.class_names}

    assert set(CANNOT) <= known


def test_a_network_without_a_loss_is_refused() -> None:
    model = zoo.build("gpt2", "causal_lm")

    with pytest.raises(zoo.ZooError, match="^gpt2: has no loss$"):
        zoo.loss_of(model, {"input_ids": zoo.tiny_batch(model)["input_ids"]})


def test_a_small_network_survives_saving(tmp_path: Path) -> None:
    model = zoo.build("gemma3", "causal_lm")
    batch = zoo.tiny_batch(model)

    model.save_pretrained(str(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))

    with torch.no_grad():
        assert torch.equal(zoo.loss_of(loaded, batch), zoo.loss_of(model, batch))
