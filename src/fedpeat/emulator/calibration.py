"""What a choice of blocks looks at: text as a network's inputs, and the states it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core.errors import EmulatorError
from fedpeat.model.blocks import Blocks
from fedpeat.model.modes import evaluating

__all__ = ["Batch", "block_states", "first_tensor", "mean_loss_of", "second_moments"]

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


def block_states(
    model: nn.Module, blocks: Blocks, indices: Sequence[int], batch: Batch
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return what enters and what leaves some blocks in one call of a network.

    Args:
        model: The network.
        blocks: Its blocks.
        indices: Blocks to watch.
        batch: Inputs of the call.

    Returns:
        Pairs of hidden states (batch, positions, width), by block.
    """
    entered: dict[int, Tensor] = {}
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            entered[index] = first_tensor([*args, *kwargs.values()])

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            states[index] = (entered[index], first_tensor(output))

        return hook

    handles = []
    for index in indices:
        parts = blocks.parts(model, index)
        handles.append(parts[0][1].register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(parts[-1][1].register_forward_hook(leave(index)))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return states


def second_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return the mean of x x^T over all inputs x of linear layers; 0 for one that is not called.

    Args:
        model: The network.
        layers: Some of its linear layers by name.
        batches: Inputs of the network.

    Returns:
        Symmetric matrices (inner, inner) by layer.
    """
    sums = {}
    counts = dict.fromkeys(layers, 0)
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        width = weight.shape[0] if isinstance(layer, Conv1D) else weight.shape[1]
        sums[name] = torch.zeros(width, width, device=weight.device)

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            sums[name] += rows.T @ rows
            counts[name] += rows.shape[0]

        return hook

    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.inference_mode():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.clone() / max(1, counts[name]) for name, total in sums.items()}


def first_tensor(value: Any) -> Tensor:
    """Return a block's hidden states, which come first in what it takes and gives.

    Raises:
        EmulatorError: If there is no tensor.
    """
    items: Iterable[Any] = [value] if isinstance(value, Tensor) else value
    for item in items.values() if isinstance(items, Mapping) else items:
        if isinstance(item, Tensor):
            return item
    raise EmulatorError("a block takes or gives no tensor; its hidden states cannot be compared")
