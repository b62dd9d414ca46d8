"""Any network can be inspected: a folder in the Hub's form, or a module of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fedpeat
import fedpeat.experiments.inspect as module
import zoo
from fedpeat.core.errors import ConfigError, EmulatorError, ModelError, SplitError
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.examples import random_inputs
from fedpeat.model.loading import fingerprint
from tiny import tiny_model

FAMILIES = [
    ("causal_lm", "gpt2", ["transformer.h"]),
    ("masked_lm", "bert", ["bert.encoder.layer"]),
    ("sequence_classification", "distilbert", ["distilbert.transformer.layer"]),
    ("seq2seq_lm", "t5", ["encoder.block", "decoder.block"]),
    ("seq2seq_lm", "bart", ["model.encoder.layers", "model.decoder.layers"]),
    ("image_classification", "vit", ["vit.layers"]),
    ("image_classification", "swin", [f"swin.encoder.layers.{i}.blocks" for i in range(4)]),
]


@pytest.mark.parametrize(("family", "model_type", "paths"), FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_folder_is_loaded_as_what_its_configuration_names_and_cut_exactly(
    family: str, model_type: str, paths: list[str], tmp_path: Path
) -> None:
    network = zoo.build(model_type, family)
    network.save_pretrained(str(tmp_path))
    found = fedpeat.inspect(tmp_path, num_bottom=1, num_top=1)
    assert found.architecture == type(network).__name__
    assert [path for item in found.lists for path in item.paths] == paths
    assert found.num_parameters == sum(p.numel() for p in network.parameters())
    assert len(found.checks) == 4


def test_what_devices_would_hold_is_what_is_there() -> None:
    found = fedpeat.inspect(tiny_model("llama"), ratios=[1, 0.5], num_bottom=1, num_top=2)
    full, half = found.rungs
    block = found.lists[0].num_parameters // 6
    assert found.tuned == (0, 4, 5)
    assert (full.kept, half.kept) == ((0, 1, 2, 3, 4, 5), (0, 2, 4, 5))
    assert full.num_parameters == found.num_parameters
    assert half.num_parameters == found.num_parameters - 2 * block
    assert half.num_bytes == 4 * half.num_parameters
    # q and o (32 -> 32), k and v (32 -> 16), gate and up (32 -> 64), down (64 -> 32), of rank 8
    per_block = 8 * (2 * 64 + 2 * 48 + 3 * 96)
    assert half.adapter_parameters == full.adapter_parameters == 3 * per_block
    assert half.adapter_bytes == 4 * 3 * per_block


def test_adapter_on_every_kept_block_shrinks_with_them() -> None:
    found = fedpeat.inspect(tiny_model("llama"), ratios=[1, 0.5], placement="all")
    full, half = found.rungs
    assert full.adapter_parameters is not None
    assert half.adapter_parameters == full.adapter_parameters / 2


def test_blocks_that_the_architecture_needs_are_named_with_the_reason() -> None:
    found = fedpeat.inspect(zoo.build("t5", "seq2seq_lm"), num_bottom=2, num_top=1)
    assert found.needed == {0: "is alone of its kind", 6: "is alone of its kind"}


def test_inspecting_leaves_a_network_as_it_was() -> None:
    network = tiny_model("gpt2").train().requires_grad_()
    before = fingerprint(network)
    fedpeat.inspect(network)
    assert fingerprint(network) == before
    assert all(m.training for m in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


# --- networks of one's own -----------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Custom(nn.Module):
    """Six blocks in a chain, and three side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(Residual() for _ in range(6))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        for block in self.body:
            x = block(x)
        return [head(x) for head in self.heads]


@pytest.mark.parametrize("inputs", [torch.ones(2, 4), [torch.ones(2, 4)], {"x": torch.ones(2, 4)}])
def test_network_of_ones_own_is_inspected_with_inputs_in_any_form(inputs: object) -> None:
    found = fedpeat.inspect(Custom(), inputs)
    assert found.lists[0].paths == ("body",)
    assert found.rungs[1].kept == (0, 1, 2, 4, 5)
    assert found.rungs[1].adapter_parameters == 4 * 8 * (4 + 4)
    assert len(found.checks) == 3


def test_named_list_whose_members_form_no_chain_is_refused() -> None:
    with pytest.raises(SplitError, match="what heads.0 gives does not enter heads.1"):
        fedpeat.inspect(Custom(), torch.ones(2, 4), blocks="heads", num_bottom=1, num_top=1)


@pytest.mark.parametrize(
    ("inputs", "error", "said"),
    [
        (None, ModelError, "Custom is no network of transformers and needs inputs"),
        ({"y": torch.ones(2, 4)}, SplitError, "Custom does not run with y: TypeError: .*'y'"),
        ([torch.ones(2, 4)] * 2, ModelError, "does not take these inputs: too many positional"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    inputs: object, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fedpeat.inspect(Custom(), inputs)


def test_forward_without_names_is_refused() -> None:
    class Unnamed(Custom):
        def forward(self, *x: Tensor) -> list[Tensor]:
            return super().forward(*x)

    with pytest.raises(ModelError, match=r"must name its inputs, got \*x; wrap it in a module"):
        fedpeat.inspect(Unnamed(), torch.ones(2, 4))


# --- what cannot be cut --------------------------------------------------------------------------


def test_network_whose_one_block_runs_over_and_over_is_refused_with_the_reason() -> None:
    message = "runs the one block in albert.encoder.albert_layer_groups 6 times over, so that none"
    with pytest.raises(SplitError, match=message):
        fedpeat.inspect(zoo.build("albert", "masked_lm"))


def test_network_that_takes_neither_text_nor_images_is_refused() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="Wav2Vec2ForCTC takes input_values; from Python"):
        fedpeat.inspect(transformers.Wav2Vec2ForCTC(config))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"ratios": [0.5, 1.5]}, ConfigError, r"ratios must be in \(0, 1\], got 1.5"),
        ({"num_bottom": -1}, ConfigError, "adapter.num_bottom must be 0 or more, got -1"),
        ({"num_bottom": 5}, SplitError, "wants 7 tuned blocks, the model has 6"),
        ({"num_bottom": 4}, EmulatorError, "no blocks to compress: 6 of 6 are tuned"),
        ({"cut": "encoder"}, SplitError, "has no encoder to cut by itself"),
        ({"blocks": "lm_head"}, SplitError, "lm_head must be a ModuleList.* found: model.layers"),
    ],
)
def test_what_cannot_be_done_is_refused(
    settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fedpeat.inspect(tiny_model("llama"), **settings)


def broken_copy(model: nn.Module, blocks: Any, kept: Any) -> nn.Module:
    small: nn.Module = BUILD(model, blocks, kept)
    with torch.no_grad():
        next(small.parameters()).add_(1)
    return small


BUILD = build_from_blocks


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("build_from_blocks", broken_copy, "an emulator of all blocks answers as the full model"),
        (
            "_plug",
            lambda _small, whole, *_: nn.init.zeros_(next(whole.parameters())),
            "cut and plugged back, every weight",
        ),
    ],
)
def test_cut_that_is_not_exact_is_noticed(
    name: str, broken: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    message = f"LlamaForCausalLM cannot be cut; this does not hold: {said}"
    with pytest.raises(SplitError, match=message):
        fedpeat.inspect(tiny_model("llama"))


def test_inputs_of_text_end_with_its_end_and_have_no_other_special_token() -> None:
    model = tiny_model("llama")
    model.config.pad_token_id, model.config.eos_token_id = 5, 7
    ids = random_inputs(model)["input_ids"]
    assert ids[:, -1].tolist() == [7, 7]
    assert not {5, 7, 0} & set(ids[:, :-1].flatten().tolist())
    assert torch.equal(ids, random_inputs(model)["input_ids"])
