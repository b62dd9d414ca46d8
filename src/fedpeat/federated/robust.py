"""What bounds the harm of hostile updates: clipping, and averages that few cannot move. NumPy only.

The order in a round is: screen, clip, leave out devices where they are too few for the rule, apply
the rule. The server's own update is trusted. It is not clipped and no rule sees it; what the rule
makes of the devices is averaged with it, each with its share of the examples. Under a robust rule
every device counts the same, with as many examples as the median device claims to have.

What a rule does not do: with LoRA it works on the factors. The median of B times the median of A is
not the median of BA, whose entries may end up outside of those of all honest devices even if those
of both factors are inside: two honest devices with (B, A) = (1, 0) and (0, 1) and an attacker with
(1, 1) have BA = 0, 0 and 1, and a median BA of 1. Where a round tunes one factor ("ffa", "rolora")
BA is linear in it, so that at rank 1 this cannot be, and at higher ranks less easily. Nor does a
rule see a backdoor that stays within the spread of honest updates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from fedpeat.adapter.lora import State
from fedpeat.core.errors import ConfigError
from fedpeat.core.records import ParticipantResult
from fedpeat.federated.admission import Outcome
from fedpeat.federated.aggregation import (
    LoraAggregation,
    by_holders,
    update_norm,
    weighted_average,
)
from fedpeat.federated.screening import shown

__all__ = [
    "ROBUST_RULES",
    "Averaged",
    "Defence",
    "coordinate_median",
    "multi_krum",
    "trimmed_mean",
]

Centre = tuple[dict[str, np.ndarray], list[float]]
"""What a rule makes of some updates, and the share that each has in it."""


def coordinate_median(updates: Sequence[State], _: int = 0) -> Centre:
    """Return the median of every entry.

    However many updates are arbitrary, if less than half of all, every entry stays between the
    least and the largest of the others.

    Source:
        Yin et al. (2018), Byzantine-robust distributed learning, algorithm 1, option I.
    """
    centre = {name: np.median(stack, axis=0) for name, stack in _stacks(updates)}
    return centre, [1 / len(updates)] * len(updates)


def trimmed_mean(updates: Sequence[State], num_attackers: int) -> Centre:
    """Return the mean of every entry without its ``num_attackers`` least and largest values.

    Source:
        Yin et al. (2018), Byzantine-robust distributed learning, algorithm 1, option II.
    """
    kept = slice(num_attackers, len(updates) - num_attackers)
    centre = {name: np.sort(stack, axis=0)[kept].mean(axis=0) for name, stack in _stacks(updates)}
    return centre, [1 / len(updates)] * len(updates)


def multi_krum(updates: Sequence[State], num_attackers: int) -> Centre:
    """Return the mean of the n - f updates that are nearest to their n - f - 2 nearest ones.

    What one device holds in all tensors is one vector. Takes time n^2 d, for d entries.

    Args:
        updates: Updates of n devices.
        num_attackers: f; n must be at least 2 f + 3.

    Source:
        Blanchard et al. (2017), Machine learning with adversaries, sections 4 and 5.
    """
    n = len(updates)
    nearest = np.sort(_squared_distances(updates), axis=1)[:, : n - num_attackers - 2]
    ranked = np.argsort(nearest.sum(axis=1), kind="stable")
    chosen = sorted(ranked[: n - num_attackers].tolist())
    centre = weighted_average([_exact(updates[i]) for i in chosen], [1.0] * len(chosen))
    return centre, [1 / len(chosen) if i in chosen else 0.0 for i in range(n)]


ROBUST_RULES: dict[str, tuple[Callable[[Sequence[State], int], Centre], int]] = {
    "median": (coordinate_median, 1),
    "trimmed_mean": (trimmed_mean, 1),
    "multi_krum": (multi_krum, 3),
}
"""Robust rules, and how many updates each needs beside two for every assumed attacker."""


@dataclass(frozen=True)
class Averaged:
    """What comes of a round's updates.

    Attributes:
        tensors: The average; what nobody counts in is missing, and so stays as it is.
        weights: Share of each participant, over all entries.
        warnings: What had to be left out.
    """

    tensors: dict[str, np.ndarray]
    weights: list[float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Defence:
    """How a federation guards itself against poisoned updates.

    Attributes:
        rule: "mean", which is none, or a name in ``ROBUST_RULES``.
        attackers_ratio: Share of a round's updates that are assumed hostile, in [0, 0.5).
        clip_norm: Largest distance of an update from what its device was given; None for no bound.
        clip_to_median: Whether that bound is the median of the round's distances.
        max_rejections: Rejected updates after which a device is set aside; None for never.

    Source:
        Sun et al. (2019), Can you really backdoor federated learning?, for norm bounding.
    """

    rule: str = "mean"
    attackers_ratio: float = 0.2
    clip_norm: float | None = None
    clip_to_median: bool = False
    max_rejections: int | None = None

    def num_attackers(self, num_updates: int) -> int:
        """Return how many of some updates are assumed hostile: at least one, unless none ever is.

        A cohort is drawn, so that a few devices may hold more attackers than their share.
        """
        if self.attackers_ratio == 0:
            return 0
        return max(1, math.floor(self.attackers_ratio * num_updates + 1e-9))  # 0.29 * 100 < 29

    def shortage(self, num_updates: int) -> str:
        """Say why some updates are too few for the rule; empty if they are not."""
        if self.rule == "mean":
            return ""
        num_attackers = self.num_attackers(num_updates)
        fewest = 2 * num_attackers + ROBUST_RULES[self.rule][1]
        if num_updates >= fewest:
            return ""
        return f"{self.rule} against {num_attackers} of {num_updates} needs at least {fewest}"

    def check_cohort(self, cohort_size: int) -> None:
        """Check that a full round's devices are enough for the rule.

        Raises:
            ConfigError: If they are not, so that no device would ever count.
        """
        if shortage := self.shortage(cohort_size):
            raise ConfigError(
                f"federated.robust_rule must be one for which the devices of a round are enough, "
                f"got {self.rule!r} with {cohort_size}: {shortage}"
            )

    def clipped(self, updates: Sequence[Outcome]) -> list[Outcome]:
        """Return updates with those of devices moved within the bound, in their direction.

        A device on a smaller rung has fewer tensors, and so more room for each.
        """
        devices = [u for u in updates if u.result.role == "device"]
        bound = self.clip_norm
        if self.clip_to_median and devices:
            bound = float(np.median([update_norm(u.arrays, u.start) for u in devices]))
        if bound is None:
            return list(updates)
        return [_within(bound, u) if u.result.role == "device" else u for u in updates]

    def enough(self, updates: Sequence[Outcome]) -> tuple[list[Outcome], list[str]]:
        """Return the updates that can count, and why others cannot.

        Too few devices for the rule are left out, so that the server's update is all there is.
        """
        devices = [u for u in updates if u.result.role == "device"]
        shortage = self.shortage(len(devices)) if devices else ""
        if not shortage:
            return list(updates), []
        others = [u for u in updates if u.result.role != "device"]
        return others, [f"the updates of {len(devices)} devices are left out: {shortage}"]

    def levelled(self, updates: Sequence[Outcome]) -> list[Outcome]:
        """Return updates that weigh what the rule lets them: the median of what devices claim."""
        claims = [u.result.num_examples for u in updates if u.result.role == "device"]
        if self.rule == "mean" or not claims:
            return list(updates)
        alike = max(1, int(np.median(claims)))
        return [
            replace(u, result=replace(u.result, num_examples=alike))
            if u.result.role == "device"
            else u
            for u in updates
        ]

    def average(
        self,
        states: Sequence[State],
        weights: Sequence[float],
        trusted: Sequence[bool],
        current: State,
        lora: LoraAggregation,
    ) -> Averaged:
        """Return the average of what a round tuned, each tensor's over those who have it.

        The rule is applied to the tensors that the same participants have together; devices that
        are too few there are left out there.

        Args:
            states: Tensors of each participant; those on a smaller rung have fewer.
            weights: Share of each in a plain average.
            trusted: Whether each is the server.
            current: The round's adapter.
            lora: The plain average.
        """
        if self.rule == "mean":
            return Averaged(lora.average(states, weights, current), list(weights))
        tensors: dict[str, np.ndarray] = {}
        shares, num_entries = np.zeros(len(states)), 0
        num_short, why = 0, ""
        for holders, names in by_holders(states, current).items():
            own = [_exact({name: states[i][name] for name in names}) for i in holders]
            mean, group, shortage = self._combined(
                own, [weights[i] for i in holders], [trusted[i] for i in holders]
            )
            tensors |= {name: array.astype(current[name].dtype) for name, array in mean.items()}
            size = sum(current[name].size for name in names)
            shares[list(holders)] += size * np.asarray(group)
            num_entries += size
            if shortage:
                num_short, why = num_short + len(names), shortage
        told = f"{num_short} pieces of the adapter take nothing from devices: {why}"
        return Averaged(tensors, (shares / max(1, num_entries)).tolist(), (told,) if why else ())

    def _combined(
        self, states: Sequence[State], weights: Sequence[float], trusted: Sequence[bool]
    ) -> tuple[dict[str, np.ndarray], list[float], str]:
        """Return the average of those who have the same tensors, their shares, and a shortage."""
        devices = [i for i, is_server in enumerate(trusted) if not is_server]
        shortage = self.shortage(len(devices)) if devices else ""
        shares = [w if own else 0.0 for w, own in zip(weights, trusted, strict=True)]
        parts = [(states[i], weights[i]) for i, is_server in enumerate(trusted) if is_server]
        if devices and not shortage:
            rule, _ = ROBUST_RULES[self.rule]
            centre, ratios = rule([states[i] for i in devices], self.num_attackers(len(devices)))
            together = sum(weights[i] for i in devices)
            parts.append((centre, together))
            for i, ratio in zip(devices, ratios, strict=True):
                shares[i] = ratio * together
        total = sum(shares)
        if not total:
            return {}, shares, shortage
        mean = weighted_average([state for state, _ in parts], [weight for _, weight in parts])
        return mean, [share / total for share in shares], shortage

    def counted(
        self, num_rejections: Mapping[str, int], results: Sequence[ParticipantResult]
    ) -> tuple[dict[str, int], list[str]]:
        """Return how many updates of each device were rejected so far, and what to warn of.

        Args:
            num_rejections: How many before the round, by device.
            results: The round's.
        """
        if self.max_rejections is None:
            return dict(num_rejections), []
        counts, warnings = dict(num_rejections), []
        for result in results:
            if result.status == "rejected" and result.role == "device":
                name = result.client_id
                counts[name] = counts.get(name, 0) + 1
                if counts[name] == self.max_rejections:
                    warnings.append(
                        f"{shown(name)} is set aside from now on: {counts[name]} of its updates "
                        f"were rejected, the last one since {result.reason}"
                    )
        return counts, warnings

    def set_aside(self, num_rejections: Mapping[str, int]) -> list[str]:
        """Return the devices that take part no more."""
        limit = self.max_rejections
        return sorted(n for n, count in num_rejections.items() if limit and count >= limit)


def _within(bound: float, update: Outcome) -> Outcome:
    """Return an update no farther than a bound from where it began."""
    norm = update_norm(update.arrays, update.start)
    ratio = bound / norm if norm > bound else 1.0
    result = replace(update.result, clip_ratio=ratio)
    if ratio == 1.0:
        return replace(update, result=result)
    start, end = _exact(update.start), _exact(update.arrays)
    arrays = {
        name: (start[name] + ratio * (end[name] - start[name])).astype(array.dtype)
        for name, array in update.arrays.items()
    }
    return replace(update, result=result, arrays=arrays)


def _stacks(
    updates: Sequence[State],
) -> Iterator[tuple[str, Float[np.ndarray, "clients ..."]]]:
    for name in updates[0]:
        yield name, np.stack([update[name].astype(np.float64) for update in updates])


def _squared_distances(updates: Sequence[State]) -> Float[np.ndarray, "clients clients"]:
    """Return the squared distance of every two updates; an update is infinitely far from itself."""
    distances = np.full((len(updates), len(updates)), np.inf)
    for i, j in itertools.combinations(range(len(updates)), 2):
        distances[i, j] = distances[j, i] = update_norm(updates[i], updates[j]) ** 2
    return distances


def _exact(state: State) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in state.items()}
