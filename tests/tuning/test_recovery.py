"""An attack spends its budget and no more, and says what it reached on the way."""

from __future__ import annotations

import pytest
import torch

from fedpeat.core.errors import ConfigError, EmulatorError
from fedpeat.tuning.evaluation import evaluate
from fedpeat.tuning.recovery import Budget, Reached, recover
from fedpeat.tuning.schedule import warmup_cosine
from tiny import random_text, tiny_model


def attacked(num_tokens: int = 1500, rate: float = 3e-3, seed: int = 0) -> list[Reached]:
    model = tiny_model("llama", num_blocks=2).requires_grad_(True)
    text = random_text(8)
    return recover(
        model, text, text, Budget(num_tokens, 4, rate), seed=seed, progress=lambda *_: None
    )


def test_quality_is_told_at_shares_of_the_budget_in_whole_batches() -> None:
    assert [point.num_tokens for point in attacked()] == [0, 384, 768, 1472]  # of 23 batches


def test_it_starts_from_the_network_as_it_is_and_gets_better() -> None:
    reached = attacked()
    model = tiny_model("llama", num_blocks=2)
    assert reached[0].quality == evaluate(model, random_text(8), 4)
    assert reached[-1].quality.perplexity < 0.8 * reached[0].quality.perplexity


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    torch.manual_seed(1)
    one = attacked()
    torch.manual_seed(2)
    assert attacked() == one
    assert attacked(seed=1)[-1] != one[-1]


def test_a_budget_below_one_batch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="--budget must be at least one batch of 64 tokens, got 63"
    ):
        attacked(63)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(EmulatorError, match="loss is not finite after .* at learning rate 1e"):
        attacked(rate=1e30)


def test_the_learning_rate_rises_over_a_twentieth_and_ends_at_0() -> None:
    shares = [warmup_cosine(step, 40) for step in range(40)]
    assert shares[:3] == pytest.approx([0.5, 1.0, 1.0], rel=0.01)
    assert shares[20] == pytest.approx(0.5, abs=0.05)
    assert shares[-1] == pytest.approx(0, abs=1e-9)
