"""The loss of a network on examples with one label for each output that counts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedpeat.data.examples import IGNORED, Examples

__all__ = [
    "Batch",
    "autocast",
    "batch_of",
    "losses_of",
    "mean_loss",
    "mean_loss_of_logits",
    "scores",
]


@dataclass(frozen=True)
class Batch:
    """Some examples on a device, as a network takes them.

    Attributes:
        inputs: Tensors by the name that the network's call gives them.
        labels: Class of each example, or token at each position; ``IGNORED`` where none counts.
        shift: Places from an output to its label.
        options: Further arguments of the network's call.
    """

    inputs: Mapping[str, Tensor]
    labels: Int[Tensor, "*positions"]
    shift: int
    options: Mapping[str, bool]

    @property
    def targets(self) -> Int[Tensor, "*outputs"]:
        """The labels that outputs are compared with."""
        return self.labels[:, self.shift :] if self.shift else self.labels

    @property
    def num_targets(self) -> Int[Tensor, ""]:
        return (self.targets != IGNORED).sum()

    def call(self, model: nn.Module) -> Tensor:
        """Return a network's outputs for all positions, the class scores last."""
        logits: Tensor = model(**self.inputs, **self.options).logits
        return logits


def batch_of(data: Examples, rows: np.ndarray, device: torch.device) -> Batch:
    """Return some examples on a device."""
    inputs = {name: torch.from_numpy(a).to(device) for name, a in data.inputs(rows).items()}
    labels = torch.from_numpy(data.labels(rows)).to(device)
    return Batch(inputs, labels, data.shift, data.options)


def scores(model: nn.Module, batch: Batch) -> Float[Tensor, "*outputs classes"]:
    """Return a network's scores of all classes (tokens) where there is a target.

    A soft prompt lengthens the output at the front; those positions are cut off.
    """
    return _at_targets(batch.call(model), batch)


def _at_targets(
    logits: Float[Tensor, "*positions classes"], batch: Batch
) -> Float[Tensor, "*outputs classes"]:
    if batch.labels.ndim == 1:
        return logits
    length = batch.labels.shape[1]
    return logits[:, -length:][:, : length - batch.shift]


def losses_of(
    logits: Float[Tensor, "*outputs classes"], targets: Int[Tensor, "*outputs"]
) -> Float[Tensor, "*outputs"]:
    """Return the negative log-likelihood of each target [nat], 0 where none counts."""
    flat = cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)


def mean_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean over the targets that count; 0 where none does."""
    return mean_loss_of_logits(batch.call(model), batch)


def mean_loss_of_logits(
    logits: Float[Tensor, "*positions classes"], batch: Batch
) -> Float[Tensor, ""]:
    """Return the same from what a network has put out."""
    losses = losses_of(_at_targets(logits, batch), batch.targets)
    return losses.sum() / batch.num_targets.clamp(min=1)


def autocast(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compute in the frozen weights' 16-bit type where they have one, else as is."""
    dtype = next(
        (p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None
    )
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()
