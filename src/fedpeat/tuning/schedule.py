"""The learning rate over a training of known length."""

from __future__ import annotations

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(step: int, num_steps: int) -> float:
    """Return the share of the peak rate at a step: up over 5 % of the steps, by cosine to 0."""
    warmup = max(1, num_steps // 20)
    progress = max(0.0, (step + 1 - warmup) / max(1, num_steps - warmup))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
