"""Train a network on public text, as an attacker would to get the full model's ability back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fedpeat.core.errors import ConfigError, EmulatorError
from fedpeat.data.packing import PackedText
from fedpeat.tuning.evaluation import Quality, evaluate, evaluating
from fedpeat.tuning.local import batch_rows
from fedpeat.tuning.loss import batch_of, mean_loss
from fedpeat.tuning.schedule import warmup_cosine

__all__ = ["CHECKPOINTS", "Budget", "Reached", "recover"]

CHECKPOINTS = (0.0, 0.25, 0.5, 1.0)
"""Shares of the budget after which quality is measured."""


@dataclass(frozen=True)
class Budget:
    """What an attack may spend.

    Attributes:
        num_tokens: Tokens in all.
        batch_size: Blocks in a batch.
        learning_rate: Peak learning rate of AdamW (warm-up over 5 % of the steps, then cosine to
            0).
    """

    num_tokens: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Reached:
    """Quality on held-out text after some tokens of training."""

    num_tokens: int
    quality: Quality


def recover(
    model: nn.Module,
    text: PackedText,
    held_out: PackedText,
    budget: Budget,
    *,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> list[Reached]:
    """Train all weights of a network that ask for it, in place, and measure on the way.

    Args:
        model: The network, in float32.
        text: What to train on, over and over if the budget is larger.
        held_out: What to measure on.
        budget: What may be spent.
        seed: Seed of the batches.
        progress: Called with tokens done, tokens in all and the loss.

    Returns:
        Quality at each of CHECKPOINTS; those before the last are read while the learning rate is
        still high, so that a run of that budget alone would do a little better.

    Raises:
        ConfigError: If the budget is below one batch.
        EmulatorError: If the loss is not finite.
    """
    tokens_per_step = budget.batch_size * text.tokens_per_example
    num_steps = budget.num_tokens // tokens_per_step
    if num_steps == 0:
        raise ConfigError(
            f"--budget must be at least one batch of {tokens_per_step:,} tokens, "
            f"got {budget.num_tokens:,}"
        )
    stops = {round(share * num_steps) for share in CHECKPOINTS}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=budget.learning_rate, weight_decay=0.1, fused=True)
    reached = [Reached(0, evaluate(model, held_out, budget.batch_size))]
    with evaluating(model):
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = budget.learning_rate * warmup_cosine(step, num_steps)
            rows = batch_rows(text.num_examples, budget.batch_size, step, seed)
            loss = mean_loss(model, batch_of(text, rows, trained[0].device))
            if not math.isfinite(value := loss.item()):
                raise EmulatorError(
                    f"loss is not finite after {step * tokens_per_step:,} tokens at learning rate "
                    f"{budget.learning_rate:g}; name lower --learning-rates"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = (step + 1) * tokens_per_step
            if step + 1 in stops:
                reached.append(Reached(done, evaluate(model, held_out, budget.batch_size)))
            progress(done, num_steps * tokens_per_step, value)
    return reached
