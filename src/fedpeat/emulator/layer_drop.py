"""Keep evenly spaced blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedpeat.emulator.calibration import Batch
from fedpeat.model.blocks import Blocks

__all__ = ["select_evenly", "uniform_layer_drop"]


def uniform_layer_drop(candidates: Sequence[int], num_kept: int) -> list[int]:
    """Return evenly spaced blocks, the first and the last among them.

    Args:
        candidates: Block indices to choose from, rising.
        num_kept: How many to keep, at least 1.

    Source:
        Xiao, Lin, Han (2023), Offsite-Tuning, arXiv:2302.04870: index i of n is round(i (L - 1) /
        (n - 1)).
    """
    last = len(candidates) - 1
    if num_kept == 1:
        return [candidates[last // 2]]
    return [candidates[int(i * last / (num_kept - 1) + 0.5)] for i in range(num_kept)]


def select_evenly(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_kept: int,
    batches: Sequence[Batch],
) -> list[int]:
    """Return evenly spaced candidates; nothing else is looked at."""
    del model, blocks, batches
    return uniform_layer_drop(candidates, num_kept)
