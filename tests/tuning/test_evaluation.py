"""Scoring a split: right numbers, and no trace left in the model (invariant 7)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.data.packing import PackedText
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.evaluation import Quality, evaluate
from tiny import random_text, tiny_model


def test_perplexity_is_that_of_transformers_own_loss() -> None:
    model, data = tiny_model("llama"), random_text(5)
    ids = torch.from_numpy(data.input_ids.astype(np.int64))
    expected = math.exp(float(model(input_ids=ids, labels=ids).loss))
    assert evaluate(model, data, 2).perplexity == pytest.approx(expected, rel=1e-5)


def test_numbers_worked_by_hand() -> None:
    quality = Quality(nll=8 * math.log(2), num_tokens=4, num_bytes=16)
    assert quality.perplexity == pytest.approx(4)  # 2 bit a token
    assert quality.byte_perplexity == pytest.approx(math.sqrt(2))  # half a bit a byte
    assert quality.bits_per_byte == pytest.approx(0.5)


def test_tokens_and_bytes_that_count_exclude_the_first_of_each_block_and_the_masked() -> None:
    data = random_text(3)
    mask = data.loss_mask.copy()
    mask[0, :5] = False
    quality = evaluate(tiny_model("llama"), PackedText(data.input_ids, mask, data.token_bytes), 2)
    assert quality.num_tokens == 3 * 15 - 4  # 4 of the 5 masked could have counted
    assert quality.num_bytes == 2 * quality.num_tokens


def test_result_does_not_depend_on_the_batch_size() -> None:
    model, data = tiny_model("gpt2"), random_text(7)
    assert evaluate(model, data, 1).nll == pytest.approx(evaluate(model, data, 7).nll, rel=1e-6)


def test_evaluation_leaves_mode_dropout_gradients_and_random_stream_alone() -> None:
    model = tiny_model("gpt2")
    model.train()
    model.get_submodule("transformer.h.2").eval()
    modes = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    before = torch.get_rng_state()
    first = evaluate(model, random_text(), 4)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluate(model, random_text(), 4) == first  # dropout was off


def test_a_prompt_is_not_scored_as_text() -> None:
    model = tiny_model("llama")
    config = AdapterConfig(method="prompt", num_virtual_tokens=3)
    tunable = attach(model, find_blocks(model), [0, 5], config)
    quality = evaluate(tunable.model, random_text(4), 2)
    assert quality.num_tokens == 4 * 15
    assert math.isfinite(quality.perplexity)


def test_an_exploded_model_has_infinite_perplexity_not_an_exception() -> None:
    assert Quality(nll=1e9, num_tokens=1, num_bytes=1).perplexity == math.inf
