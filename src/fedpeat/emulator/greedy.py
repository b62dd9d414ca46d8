"""Drop, one after the other, the block without which the loss is lowest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedpeat.emulator.calibration import Batch, mean_loss_of
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import only_blocks

__all__ = ["removal_order", "select_greedily"]


@torch.no_grad()
def removal_order(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_dropped: int,
    batches: Sequence[Batch],
) -> list[int]:
    """Return blocks in the order in which they are dropped; a shorter order is its beginning.

    Source:
        Song et al. (2024), SLEB, arXiv:2402.09025, algorithm 1.
    """
    kept, order = list(range(blocks.num_blocks)), []
    for _ in range(num_dropped):
        losses = {}
        for index in [i for i in candidates if i in kept]:
            with only_blocks(model, blocks, [i for i in kept if i != index]):
                losses[index] = float(mean_loss_of(model, batches))
        worst = min(losses, key=lambda index: (losses[index], index))
        kept.remove(worst)
        order.append(worst)
    return order


def select_greedily(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_kept: int,
    batches: Sequence[Batch],
) -> list[int]:
    """Return the candidates that greedy removal leaves, rising."""
    order = removal_order(model, blocks, candidates, len(candidates) - num_kept, batches)
    return [index for index in candidates if index not in order]
