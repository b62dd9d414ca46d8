"""How accepted updates become the next adapter: an average, then a server optimiser. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeat.core.errors import AggregationError

__all__ = ["SERVER_OPTIMIZERS", "ServerOptimizer", "update_norm", "weighted_average"]

State = Mapping[str, np.ndarray]
Moments = dict[str, np.ndarray]


def weighted_average(states: Sequence[State], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """Return the average of adapters that have the same tensors, summed in float64.

    Args:
        states: Tensors of each participant, by name.
        weights: Weight of each, e.g. its number of examples; only their ratios matter.

    Raises:
        AggregationError: If there is nothing to average, a weight is negative or not finite, or all
            are 0.
    """
    if not states or len(states) != len(weights):
        raise AggregationError(
            f"want one weight for each of at least one update, got {len(states)} and {len(weights)}"
        )
    total = float(sum(weights))
    if not 0 < total < math.inf or min(weights) < 0:  # NaN compares as false
        raise AggregationError(
            f"weights must be finite, 0 or more, and not all 0, got {list(weights)}"
        )
    average = {}
    for name, first in states[0].items():
        sums = np.zeros(first.shape, np.float64)
        for state, weight in zip(states, weights, strict=True):
            sums += (weight / total) * state[name]
        average[name] = sums.astype(first.dtype)
    return average


def update_norm(new: State, old: State) -> float:
    """Return the Euclidean distance between two adapters, whatever the order of their tensors."""
    squares = [float(np.sum((new[name].astype(np.float64) - old[name]) ** 2)) for name in old]
    return math.sqrt(math.fsum(squares))  # a sum that rounds once, so that no order changes it


@dataclass(frozen=True)
class ServerOptimizer:
    """A rule that moves the adapter along the averaged update.

    Attributes:
        rule: Name in ``SERVER_OPTIMIZERS``.
        learning_rate: Step size on the server; 1 with fedavg takes the average itself.
        momentum: Momentum (fedavgm), beta_1 (fedadam, fedyogi).
        beta2: Decay of the second moment.
        tau: Degree of adaptivity; the second moment starts at tau^2.

    Source:
        McMahan et al. (2017), FedAvg; Hsu et al. (2019), FedAvgM; Reddi et al. (2021), Adaptive
        federated optimization, algorithm 2 (FedAdam, FedYogi).
    """

    rule: str = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def step(
        self, current: State, average: State, moments: Moments
    ) -> tuple[dict[str, np.ndarray], Moments]:
        """Return the next adapter and the optimiser's new moments (empty at the start)."""
        return SERVER_OPTIMIZERS[self.rule](self, current, average, moments)


def _fedavg(
    opt: ServerOptimizer, current: State, average: State, moments: Moments
) -> tuple[Moments, Moments]:
    if opt.learning_rate == 1:
        return dict(average), moments
    return {
        n: _moved(current[n], opt.learning_rate * _delta(current, average, n)) for n in current
    }, moments


def _fedavgm(
    opt: ServerOptimizer, current: State, average: State, moments: Moments
) -> tuple[Moments, Moments]:
    new_moments = {
        f"m/{n}": opt.momentum * moments.get(f"m/{n}", 0.0) + _delta(current, average, n)
        for n in current
    }
    return {
        n: _moved(current[n], opt.learning_rate * new_moments[f"m/{n}"]) for n in current
    }, new_moments


def _fedadam(
    opt: ServerOptimizer, current: State, average: State, moments: Moments
) -> tuple[Moments, Moments]:
    return _adaptive(
        opt, current, average, moments, lambda v, d2: opt.beta2 * v + (1 - opt.beta2) * d2
    )


def _fedyogi(
    opt: ServerOptimizer, current: State, average: State, moments: Moments
) -> tuple[Moments, Moments]:
    return _adaptive(
        opt, current, average, moments, lambda v, d2: v - (1 - opt.beta2) * d2 * np.sign(v - d2)
    )


SERVER_OPTIMIZERS: dict[
    str, Callable[[ServerOptimizer, State, State, Moments], tuple[Moments, Moments]]
] = {
    "fedavg": _fedavg,
    "fedavgm": _fedavgm,
    "fedadam": _fedadam,
    "fedyogi": _fedyogi,
}


def _adaptive(
    opt: ServerOptimizer,
    current: State,
    average: State,
    moments: Moments,
    second: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[Moments, Moments]:
    new: Moments = {}
    new_moments: Moments = {}
    for name in current:
        delta = _delta(current, average, name)
        start = np.full(delta.shape, opt.tau**2)
        m = (
            opt.momentum * moments.get(f"m/{name}", np.zeros(delta.shape))
            + (1 - opt.momentum) * delta
        )
        v = second(moments.get(f"v/{name}", start), delta**2)
        new_moments |= {f"m/{name}": m, f"v/{name}": v}
        new[name] = _moved(current[name], opt.learning_rate * m / (np.sqrt(v) + opt.tau))
    return new, new_moments


def _delta(current: State, average: State, name: str) -> np.ndarray:
    return average[name].astype(np.float64) - current[name]


def _moved(tensor: np.ndarray, step: np.ndarray) -> np.ndarray:
    moved: np.ndarray = (tensor + step).astype(tensor.dtype)
    return moved
