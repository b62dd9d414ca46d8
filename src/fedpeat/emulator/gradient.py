"""Keep the blocks without which the adapter's gradients would change most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedpeat.emulator.calibration import Batch, highest, mean_loss_of
from fedpeat.model.blocks import Blocks

__all__ = ["gradient_scores", "select_by_gradient"]

_LOSS_WEIGHT = 1.0


def gradient_scores(
    model: nn.Module, blocks: Blocks, candidates: Sequence[int], batches: Sequence[Batch]
) -> dict[int, float]:
    """Return how much dropping each block would change gradients, less what it adds to the loss.

    Dropping a block is the perturbation d = -w of its weights w. The score is sum |F d| - sum g d,
    with the gradient g and the diagonal Fisher information F = mean(g^2) over batches in the place
    of the Hessian. Low scores go first.

    Source:
        Gradient-preserving compression, GradOT, arXiv:2507.04455, applied to whole blocks (ours).
    """
    scores = {}
    squares: dict[int, list[torch.Tensor]] = {}
    means: dict[int, list[torch.Tensor]] = {}
    weights = {
        index: [p for _, part in blocks.parts(model, index) for p in part.parameters()]
        for index in candidates
    }
    flat = [parameter for group in weights.values() for parameter in group]
    wanted = [parameter.requires_grad for parameter in flat]
    for parameter in flat:
        parameter.requires_grad_(True)
    try:
        for index, group in weights.items():
            squares[index] = [torch.zeros_like(p, dtype=torch.float32) for p in group]
            means[index] = [torch.zeros_like(p, dtype=torch.float32) for p in group]
        for batch in batches:
            gradients = iter(torch.autograd.grad(mean_loss_of(model, [batch]), flat))
            for index in candidates:
                for square, mean in zip(squares[index], means[index], strict=True):
                    gradient = next(gradients).float()
                    square.add_(gradient.pow(2) / len(batches))
                    mean.add_(gradient / len(batches))
    finally:
        for parameter, flag in zip(flat, wanted, strict=True):
            parameter.requires_grad_(flag)
    for index, group in weights.items():
        change = sum(
            float((square * p.detach()).abs().sum())
            for square, p in zip(squares[index], group, strict=True)
        )
        loss = sum(
            float((mean * -p.detach()).sum()) for mean, p in zip(means[index], group, strict=True)
        )
        scores[index] = change - _LOSS_WEIGHT * loss
    return scores


def select_by_gradient(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_kept: int,
    batches: Sequence[Batch],
) -> list[int]:
    """Return the candidates of the highest gradient score, rising."""
    return highest(gradient_scores(model, blocks, candidates, batches), num_kept)
