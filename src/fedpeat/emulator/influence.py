"""Keep the blocks that change their input most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedpeat.emulator.calibration import Batch, highest
from fedpeat.model.blocks import Blocks
from fedpeat.model.tracing import block_calls

__all__ = ["block_influence", "select_by_influence"]


def block_influence(
    model: nn.Module, blocks: Blocks, candidates: Sequence[int], batches: Sequence[Batch]
) -> dict[int, float]:
    """Return 1 - the mean cosine of what enters and what leaves each block, over all positions.

    Source:
        Men et al. (2024), ShortGPT, arXiv:2403.03853, equation 1.
    """
    sums = dict.fromkeys(candidates, 0.0)
    for batch in batches:
        for index, call in block_calls(model, blocks, candidates, batch).items():
            came, left = call.states
            cosine = nn.functional.cosine_similarity(came.float(), left.float(), dim=-1)
            sums[index] += float(1 - cosine.mean())
    return {index: total / len(batches) for index, total in sums.items()}


@torch.no_grad()
def select_by_influence(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_kept: int,
    batches: Sequence[Batch],
) -> list[int]:
    """Return the candidates of the highest block influence, rising."""
    return highest(block_influence(model, blocks, candidates, batches), num_kept)
