"""Gradients that hide each example: clipped one by one, summed, noise added (DP-SGD).

An example is what a batch is made of: a packed block of text, or an image. A block may hold several
documents, which it protects together; a document that fills several blocks is as many examples, and
what all of them tell together is not bounded by the epsilon of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedpeat.adapter.tunable import Tunable
from fedpeat.core.errors import AdapterError
from fedpeat.core.noise import NoiseSource
from fedpeat.data.examples import Examples
from fedpeat.tuning.loss import autocast, batch_of, mean_loss

__all__ = ["ExamplePrivacy", "refuse_mixing", "sample_rate"]


def sample_rate(num_examples: int, batch_size: int) -> float:
    """Return the chance of each example to be in a batch."""
    return min(1.0, batch_size / num_examples)


@dataclass(frozen=True)
class ExamplePrivacy:
    """How one training hides its examples.

    Attributes:
        clip_norm: Norm that the gradient of one example is scaled down to.
        noise_multiplier: Standard deviation of the noise on their sum, in units of the norm.
        noise: Noise of this training, and of no other.

    Source:
        Abadi et al. (2016), Deep learning with differential privacy, algorithm 1.
    """

    clip_norm: float
    noise_multiplier: float
    noise: NoiseSource

    def rows(self, num_examples: int, batch_size: int, step: int) -> np.ndarray:
        """Return the examples of a step: each by itself with the same chance, perhaps none."""
        drawn = self.noise.uniform(num_examples, "rows", step)
        return np.flatnonzero(drawn <= sample_rate(num_examples, batch_size))

    def put_gradients(
        self, tunable: Tunable, data: Examples, rows: np.ndarray, batch_size: int, step: int
    ) -> None:
        """Give the adapter's parameters the gradient of a step.

        Examples go through the network one at a time: that works with every adapter and every
        network whose layers do not mix examples. The sum is divided by the size of a batch that is
        expected, since how many were drawn is secret.
        """
        parameters = list(tunable.parameters.values())
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for row in rows:
            gradients = _gradients(tunable, data, np.array([row]))
            for total, gradient in zip(sums, self._clipped(gradients), strict=True):
                total.add_(gradient)
        expected = min(batch_size, data.num_examples)
        scale = self.noise_multiplier * self.clip_norm
        for (name, p), total in zip(tunable.parameters.items(), sums, strict=True):
            drawn = self.noise.normal(tuple(p.shape), "gradient", step, name)
            noise = torch.from_numpy(scale * drawn).to(total.device, torch.float32)
            p.grad = ((total + noise) / expected).to(p.dtype)

    def _clipped(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return an example's gradient within the norm; 0 for one that is not finite."""
        norm = float(torch.linalg.vector_norm(torch.stack([_norm(g) for g in gradients])))
        if not np.isfinite(norm):
            return [torch.zeros_like(g) for g in gradients]
        ratio = min(1.0, self.clip_norm / norm) if norm else 1.0
        return [g * ratio for g in gradients]


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return norm


def _gradients(tunable: Tunable, data: Examples, row: np.ndarray) -> list[torch.Tensor]:
    batch = batch_of(data, row, tunable.device)
    with autocast(tunable.model, tunable.device):
        loss = mean_loss(tunable.model, batch)
    parameters = list(tunable.parameters.values())
    if not loss.requires_grad:
        return [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in found]


def refuse_mixing(model: nn.Module) -> None:
    """Refuse a network in which one example changes what another one's gradient is.

    Raises:
        AdapterError: If it has batch normalisation.
    """
    mixing = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the class of all of them
    name = next((name for name, part in model.named_modules() if isinstance(part, mixing)), None)
    if name is not None:
        raise AdapterError(
            f"privacy.example_* needs a network whose layers do not mix examples, got {name} "
            "(batch normalisation)"
        )
