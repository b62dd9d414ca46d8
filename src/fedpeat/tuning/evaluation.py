"""How good a model is: perplexity per token, and bits per byte so that tokenizers compare."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedpeat.data.packing import PackedText
from fedpeat.model.modes import evaluating
from fedpeat.tuning.loss import autocast, batch_of, token_losses

__all__ = ["Quality", "evaluate", "evaluating"]


@dataclass(frozen=True)
class Quality:
    """Loss summed over a split.

    Attributes:
        nll: Negative log-likelihood of all tokens that count [nat].
        num_tokens: How many they are.
        num_bytes: UTF-8 bytes of text that they stand for.
    """

    nll: float
    num_tokens: int
    num_bytes: int

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


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def evaluate(model: nn.Module, data: PackedText, batch_size: int) -> Quality:
    """Score every block of a split, without touching the model's mode, gradients or random state.

    Args:
        model: A causal LM, tuned or not.
        data: The split.
        batch_size: Blocks scored at once.
    """
    device = next(model.parameters()).device
    nll, num_tokens, num_bytes = 0.0, 0, 0
    with evaluating(model), torch.inference_mode(), autocast(model, device):
        for start in range(0, data.num_examples, batch_size):
            rows = np.arange(start, min(start + batch_size, data.num_examples))
            ids, mask = batch_of(data, rows, device)
            wanted = mask[:, 1:]
            nll += float((token_losses(model, ids) * wanted).double().sum())
            num_tokens += int(wanted.sum())
            num_bytes += int((data.token_bytes[rows][:, 1:] * data.loss_mask[rows][:, 1:]).sum())
    return Quality(nll, num_tokens, num_bytes)
