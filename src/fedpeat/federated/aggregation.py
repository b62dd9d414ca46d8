"""How accepted updates become the next adapter: an average, then a server optimiser. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedpeat.adapter.lora import Part, State, mean_of_products, part_of, truncated
from fedpeat.core.errors import AggregationError
from fedpeat.core.wire import digest

__all__ = [
    "SERVER_OPTIMIZERS",
    "TUNED_PARTS",
    "LoraAggregation",
    "ServerOptimizer",
    "by_holders",
    "update_norm",
    "weighted_average",
]

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
    ratios = _ratios(states, weights)
    average = {}
    for name, first in states[0].items():
        sums = np.zeros(first.shape, np.float64)
        for state, ratio in zip(states, ratios, strict=True):
            sums += ratio * state[name]
        average[name] = sums.astype(first.dtype)
    return average


def _ratios(states: Sequence[State], weights: Sequence[float]) -> list[float]:
    if not states or len(states) != len(weights):
        raise AggregationError(
            f"want one weight for each of at least one update, got {len(states)} and {len(weights)}"
        )
    total = float(sum(weights))
    if not 0 < total < math.inf or min(weights) < 0:  # NaN compares as false
        raise AggregationError(
            f"weights must be finite, 0 or more, and not all 0, got {list(weights)}"
        )
    return [weight / total for weight in weights]


def by_holders(states: Sequence[State], current: State) -> dict[tuple[int, ...], list[str]]:
    """Return the names of the tensors that the same participants have, in a fixed order."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in current:
        if holders := tuple(i for i, state in enumerate(states) if name in state):
            groups.setdefault(holders, []).append(name)
    return groups


TUNED_PARTS: dict[str, tuple[Part, ...]] = {
    "average": ("all",),
    "ffa": ("lora_B",),
    "rolora": ("lora_B", "lora_A"),  # B first: it starts at zero, and A has no gradient until then
    "svd": ("all",),
}
"""What each way of aggregating LoRA tunes, round by round and over again."""


@dataclass(frozen=True)
class LoraAggregation:
    """How the factors of LoRA are tuned and averaged.

    The mean of products is the product of means, mean(B A) = mean(B) A, where A is the same for
    all: "ffa" freezes A for good, "rolora" A and B in turn. "svd" takes the mean of products
    itself. "average" averages A and B as if they had nothing to do with each other, which is only
    nearly right; it also serves every adapter that is not LoRA.

    Attributes:
        rule: Name in ``TUNED_PARTS``.
        client_ranks: Ranks of the devices that tune at a lower one than the adapter has; for "svd".

    Source:
        Zhang et al. (2024), FedIT ("average"); Sun et al. (2024), FFA-LoRA; Chen et al. (2025),
        RoLoRA; Bai et al. (2024), FlexLoRA ("svd", and ranks that differ).
    """

    rule: str = "average"
    client_ranks: Mapping[str, int] = field(default_factory=dict)

    def tuned_part(self, server_round: int) -> Part:
        """Return the part of the adapter that a round tunes; rounds start at 1."""
        parts = TUNED_PARTS[self.rule]
        return parts[(server_round - 1) % len(parts)]

    def lasting_parts(self, adapter: State) -> dict[str, State]:
        """Return the parts of the adapter that outlast a round, by their hash.

        What a round freezes need not be sent to a device that has it from an earlier one.
        """
        if TUNED_PARTS[self.rule] == ("all",):
            return {}
        parts = part_of(adapter, "lora_A"), part_of(adapter, "lora_B")
        return {digest(part): part for part in parts}

    def starts(self, client_ids: Sequence[str], adapter: State) -> dict[str, State]:
        """Return the adapter that each device starts from: all of it, or the best of its rank."""
        ranks = {c: self.client_ranks[c] for c in client_ids if c in self.client_ranks}
        cut = {rank: truncated(adapter, rank) for rank in set(ranks.values())}
        return {c: cut[ranks[c]] if c in ranks else adapter for c in client_ids}

    def average(
        self, states: Sequence[State], weights: Sequence[float], current: State
    ) -> dict[str, np.ndarray]:
        """Return the average of what a round tuned, each tensor's over those who have it.

        A tensor that only participants of weight 0 have is left out, and so stays as it is.

        Args:
            states: Tensors of each participant; those on a smaller rung have fewer.
            weights: Weight of each, e.g. its number of examples.
            current: The round's adapter.

        Raises:
            AggregationError: As ``weighted_average``.

        Source:
            Diao et al. (2021), HeteroFL, for the average over those who have a parameter.
        """
        _ratios(states, weights)
        average: dict[str, np.ndarray] = {}
        for holders, names in by_holders(states, current).items():
            own = [{name: states[i][name] for name in names} for i in holders]
            own_weights = [weights[i] for i in holders]
            if sum(own_weights) > 0:
                old = {name: current[name] for name in names}
                average |= self._average_of_all(own, own_weights, old)
        return average

    def _average_of_all(
        self, states: Sequence[State], weights: Sequence[float], current: State
    ) -> dict[str, np.ndarray]:
        if self.rule == "svd":
            return mean_of_products(states, _ratios(states, weights), current)
        return weighted_average(states, weights)


def update_norm(new: State, old: State) -> float:
    """Return the Euclidean distance between two adapters, whatever the order of their tensors."""
    moves = (np.subtract(new[name], old[name], dtype=np.float64) for name in old)
    squares = [float(np.sum(np.square(move))) for move in moves]
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
        """Return the next adapter and the optimiser's new moments (empty at the start).

        Tensors that were not averaged stay as they are, and so do their moments.
        """
        tuned = {name: current[name] for name in average}
        new, new_moments = SERVER_OPTIMIZERS[self.rule](self, tuned, average, moments)
        return {**current, **new}, {**moments, **new_moments}


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
