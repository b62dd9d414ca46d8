"""What a choice of blocks looks at: text as a network's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError

__all__ = ["Batch", "mean_loss_of"]

Batch = Mapping[str, Tensor]
"""A network's inputs by name, ``labels`` among them, so that its output has a ``loss``."""


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
