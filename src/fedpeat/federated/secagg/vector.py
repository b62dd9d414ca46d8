"""What a device puts into its masked vector, and what the sum of a round's vectors says.

    values of the change, times the number of examples | examples | tokens | loss | values clipped

The numbers after the values are nobody's business either: the server sees their sums alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt64

from fedpeat.adapter.lora import State
from fedpeat.core.errors import WireError
from fedpeat.federated.secagg.ring import Quantiser

__all__ = ["NUM_EXTRAS", "Sums", "read_sums", "vector_of"]

NUM_EXTRAS = 4
_LOSS_STEP = 2.0**-16


@dataclass(frozen=True)
class Sums:
    """What is learnt of the devices of a round.

    Attributes:
        mean: Mean of their adapters by examples.
        num_examples: Examples of all.
        num_tokens: Tokens that all trained on.
        mean_loss: Mean of their mean losses, each alike.
        num_clipped: Values that were clipped.
    """

    mean: dict[str, np.ndarray]
    num_examples: int
    num_tokens: int
    mean_loss: float
    num_clipped: int


def vector_of(
    quantiser: Quantiser,
    start: State,
    update: State,
    *,
    num_examples: int,
    num_tokens: int,
    mean_loss: float,
    clip_norm: float | None = None,
) -> UInt64[np.ndarray, " values"]:
    """Return a device's vector, not masked yet.

    Args:
        quantiser: How values become whole numbers.
        start: What it was given of what it tuned.
        update: What it made of that.
        num_examples: Its examples.
        num_tokens: Tokens that it trained on.
        mean_loss: Its mean loss.
        clip_norm: Largest Euclidean norm of the change; None for no bound.

    Raises:
        WireError: If something is not finite, or there are no examples or too many.
    """
    if not math.isfinite(mean_loss):
        raise WireError(f"the loss must be finite, got {mean_loss}")
    change = _flat(update) - _flat(start)
    norm = float(np.linalg.norm(change))
    if clip_norm is not None and norm > clip_norm:
        change *= clip_norm / norm
    values, num_clipped = quantiser.weighted(change, num_examples)
    limit = quantiser.limit
    extras = (num_examples, num_tokens, round(mean_loss / _LOSS_STEP), num_clipped)
    held = [max(-limit, min(limit, extra)) for extra in extras]
    return np.concatenate([values, np.array(held, np.int64)]).view(np.uint64)


def read_sums(
    quantiser: Quantiser, total: UInt64[np.ndarray, " values"], start: State, num_devices: int
) -> Sums:
    """Return what the sum of some devices' vectors says.

    Raises:
        WireError: If no honest devices have such a sum.
    """
    signed = quantiser.ring.signed(total)
    values, extras = signed[:-NUM_EXTRAS], [int(extra) for extra in signed[-NUM_EXTRAS:]]
    num_examples, num_tokens, loss, num_clipped = extras
    most = quantiser.max_examples
    if not num_devices <= num_examples <= num_devices * most:
        raise WireError(
            f"the sum of {num_devices} devices' examples must be in "
            f"[{num_devices}, {num_devices * most}], got {num_examples}"
        )
    bound = 2 ** (quantiser.num_bits - 1) * num_examples
    beyond = int(np.count_nonzero(np.abs(values) > bound))
    if beyond or num_tokens < 0 or num_clipped < 0:
        raise WireError(f"the devices' sum is out of range in {beyond} of {len(values)} values")
    mean = _flat(start) + quantiser.mean(values, num_examples)
    return Sums(
        _apart(mean, start), num_examples, num_tokens, loss * _LOSS_STEP / num_devices, num_clipped
    )


def _flat(state: State) -> Float[np.ndarray, " values"]:
    """Return all values of some tensors, in the order of their names."""
    return np.concatenate([state[name].reshape(-1).astype(np.float64) for name in sorted(state)])


def _apart(values: Float[np.ndarray, " values"], like: State) -> dict[str, np.ndarray]:
    """Return values as tensors again."""
    tensors: dict[str, np.ndarray] = {}
    place = 0
    for name in sorted(like):
        end = place + like[name].size
        tensors[name] = values[place:end].reshape(like[name].shape).astype(like[name].dtype)
        place = end
    return {name: tensors[name] for name in like}
