"""How good a model is: perplexity per token, bits per byte so that tokenizers compare, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import nn

from fedpeat.data.examples import IGNORED, Examples
from fedpeat.model.modes import evaluating
from fedpeat.tuning.loss import autocast, batch_of, losses_of, scores

__all__ = ["BESIDE", "METRICS", "Quality", "evaluate", "evaluating", "example_losses"]


@dataclass(frozen=True)
class Quality:
    """Loss and hits summed over a split.

    Attributes:
        nll: Negative log-likelihood of all targets that count, tokens or classes [nat].
        num_tokens: How many they are.
        num_bytes: UTF-8 bytes of text that they stand for; 0 for classes.
        num_correct: How many of them got the highest score.
    """

    nll: float
    num_tokens: int
    num_bytes: int
    num_correct: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return _exp(self.nll / self.num_tokens) if self.num_tokens else math.nan

    @property
    def byte_perplexity(self) -> float:
        """exp of the loss per byte of text."""
        return _exp(self.nll / self.num_bytes) if self.num_bytes else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of text [bit]."""
        return self.nll / self.num_bytes / math.log(2) if self.num_bytes else math.nan

    @property
    def accuracy(self) -> float:
        """Share of targets that got the highest score; not a number if a score is not."""
        if not self.num_tokens or math.isnan(self.nll):
            return math.nan
        return self.num_correct / self.num_tokens

    @property
    def cross_entropy(self) -> float:
        """Mean loss per target [nat]."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    def value(self, metric: str) -> float:
        """Return what a metric says."""
        return METRICS[metric](self)

    def beside(self, metric: str) -> dict[str, float]:
        """Return what is told beside a metric, by name."""
        return {name: measure(self) for name, measure in BESIDE[metric].items()}


Measure = Callable[[Quality], float]

METRICS: dict[str, Measure] = {
    "perplexity": lambda quality: quality.perplexity,
    "accuracy": lambda quality: quality.accuracy,
}

BESIDE: dict[str, dict[str, Measure]] = {
    "perplexity": {
        "bits_per_byte": lambda quality: quality.bits_per_byte,
        "perplexity_per_byte": lambda quality: quality.byte_perplexity,
    },
    "accuracy": {"cross_entropy": lambda quality: quality.cross_entropy},
}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def evaluate(model: nn.Module, data: Examples, batch_size: int) -> Quality:
    """Score a split, without touching the model's mode, gradients or random state.

    Args:
        model: A network, tuned or not.
        data: The split.
        batch_size: Examples scored at once.
    """
    device = next(model.parameters()).device
    nll, num_tokens, num_bytes, num_correct = 0.0, 0, 0, 0
    with evaluating(model), torch.inference_mode(), autocast(model, device):
        for start in range(0, data.num_examples, batch_size):
            rows = np.arange(start, min(start + batch_size, data.num_examples))
            batch = batch_of(data, rows, device)
            logits = scores(model, batch)
            nll += float(losses_of(logits, batch.targets).double().sum())
            num_tokens += int(batch.num_targets)
            num_bytes += data.num_bytes(rows)
            num_correct += int((logits.argmax(-1) == batch.targets).sum())
    return Quality(nll, num_tokens, num_bytes, num_correct)


def example_losses(
    model: nn.Module, data: Examples, rows: Int[np.ndarray, " rows"], batch_size: int
) -> Float64[np.ndarray, " rows"]:
    """Return the mean loss of each of some examples [nat]; 0 for one without a target."""
    device = next(model.parameters()).device
    found = [np.zeros(0)]
    with evaluating(model), torch.inference_mode(), autocast(model, device):
        for start in range(0, len(rows), batch_size):
            batch = batch_of(data, rows[start : start + batch_size], device)
            losses = losses_of(scores(model, batch), batch.targets).double().flatten(1)
            counts = (batch.targets.flatten(1) != IGNORED).sum(1).clamp(min=1)
            found.append((losses.sum(1) / counts).cpu().numpy())
    return np.concatenate(found)
