"""What a choice of blocks looks at: text as a network's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.model.layers import matrix_of
from fedpeat.model.modes import evaluating

__all__ = ["Batch", "highest", "mean_loss_of", "require_text", "second_moment"]

Batch = Mapping[str, Tensor]
"""A network's inputs by name, ``labels`` among them, so that its output has a ``loss``."""


def require_text(step: str, batches: Sequence[Batch], otherwise: str = "") -> None:
    """Check that there is text for a step of a recipe that looks at some.

    Raises:
        EmulatorError: If there is none.
    """
    if not batches:
        raise EmulatorError(
            f"emulator.recipe {step} looks at text of the server and got none; raise "
            f"data.server_ratio above 0{otherwise}"
        )


def highest(scores: Mapping[int, float], number: int) -> list[int]:
    """Return the blocks of the highest scores, rising; of equal ones the first."""
    return sorted(sorted(scores, key=lambda index: (-scores[index], index))[:number])


def mean_loss_of(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the mean of a network's own loss over batches, with its graph if there is one.

    Raises:
        EmulatorError: If the network gives no loss for them.
    """
    losses = []
    for batch in batches:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise EmulatorError(
                f"{type(model).__name__} gives no loss for {sorted(batch)}; a selection that looks "
                "at the loss needs labels"
            )
        losses.append(loss)
    return torch.stack(losses).mean()


def second_moment(model: nn.Module, layer: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the mean of x x^T over all inputs x of a linear layer; 0 if it is not called.

    Args:
        model: The network.
        layer: One of its linear layers.
        batches: Inputs of the network.

    Returns:
        A symmetric matrix (inner, inner).
    """
    matrix = matrix_of(layer)
    total = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
    count = 0

    def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        rows = inputs[0].detach().flatten(0, -2).float()
        total.add_(rows.T @ rows)
        count += rows.shape[0]

    handle = layer.register_forward_pre_hook(add)
    try:
        with evaluating(model), torch.inference_mode():
            for batch in batches:
                model(**batch)
    finally:
        handle.remove()
    return total / max(1, count)
