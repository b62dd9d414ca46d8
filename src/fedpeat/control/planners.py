"""Plans without learning: the same work every round, for devices chosen by a simple rule.

Each rule is a function and a line in ``RULES``. A plan is tuned by trying all there are with as
many rounds as an agent learns from, which makes the rivals that count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.process import Choices, FederationProcess
from fedpeat.core.errors import WorldError

__all__ = [
    "RULES",
    "FixedPlan",
    "FixedPlanner",
    "Planner",
    "RandomPlanner",
    "episode_returns",
    "tune",
]

Reals = Float[np.ndarray, "worlds devices"]
Flags = Bool[np.ndarray, "worlds devices"]
_FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_REALIGN_EVERY = (0, 10, 5)
_KEPT_RATIO = 4
_COHORTS = 8


@runtime_checkable
class Planner(Protocol):
    """Chooses the work of a round in each of some worlds."""

    def choose(self, process: FederationProcess) -> Choices:
        """Return what everyone is to do in the coming round."""


@dataclass(frozen=True)
class FixedPlan:
    """The same work every round.

    Attributes:
        rule: Which devices are chosen, a name in ``RULES``.
        fraction: How many, as a share of all, in (0, 1]; of the rule "deadline", how long a round
            may take as a share of one in which all take part.
        rung: Place in the ladder of the largest emulator that anyone gets; who has no memory for it
            gets the next that fits.
        local_steps: Which of the numbers of local steps to choose from.
        server_steps: Which of the numbers of the server's own steps.
        realign_every: Rounds from one alignment to the next; 0 for none.
    """

    rule: str = "random"
    fraction: float = 1.0
    rung: int = 0
    local_steps: int = 0
    server_steps: int = 0
    realign_every: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise WorldError(f"rule of a plan must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 < self.fraction <= 1:
            raise WorldError(f"fraction of a plan must be in (0, 1], got {self.fraction}")


class FixedPlanner:
    """Follows plans of one rule, the same in every world or one for each.

    Args:
        plans: One plan, or as many as there are worlds.
    """

    def __init__(self, *plans: FixedPlan) -> None:
        self.plans = plans
        self._rule = RULES[plans[0].rule]
        self._numbers = {
            item.name: np.array([getattr(plan, item.name) for plan in plans])
            for item in fields(FixedPlan)
            if item.name != "rule"
        }

    def choose(self, process: FederationProcess) -> Choices:
        """Return what everyone is to do in the coming round."""
        own = {n: np.broadcast_to(v, process.num_worlds) for n, v in self._numbers.items()}
        rungs = np.arange(process.workload.num_rungs)
        feasible = process.world.feasible & (rungs >= own["rung"][:, None, None])
        shape = feasible.shape[:2]
        choices = Choices(
            takes_part=np.asarray(feasible.any(-1)),
            rung=feasible.argmax(-1),
            local_steps=np.broadcast_to(own["local_steps"][:, None], shape),
            bandwidth=(
                np.zeros(shape, dtype=np.int64) if "bandwidth" in process.branches.device else None
            ),
            server_steps=own["server_steps"],
            realigns=_is_due(own["realign_every"], process.episode.num_rounds),
        )
        return replace(choices, takes_part=self._rule(process, choices, own["fraction"]))


class RandomPlanner:
    """Draws every choice from those that are feasible.

    Args:
        rng: What draws are made from; the process's own stream if not given.
    """

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self._rng = rng

    def choose(self, process: FederationProcess) -> Choices:
        """Return what everyone is to do in the coming round."""
        mask = process.observe()["mask"]
        scores = (self._rng or process.rng).random(mask.shape) * mask
        parts = np.split(scores, np.cumsum(process.branches.sizes)[:-1], axis=1)
        return process.read(np.stack([part.argmax(-1) for part in parts], axis=1))


def _is_due(every: Int[np.ndarray, " worlds"], done: Int[np.ndarray, " worlds"]) -> np.ndarray:
    return np.asarray((every > 0) & (done > 0) & (done % np.maximum(every, 1) == 0))


# --- who takes part ------------------------------------------------------------------------------


def _at_random(process: FederationProcess, choices: Choices, fraction: np.ndarray) -> Flags:
    return _first(process.rng.random(choices.rung.shape), choices.takes_part, fraction)


def _in_turn(process: FederationProcess, choices: Choices, fraction: np.ndarray) -> Flags:
    """Choose who has been out the longest."""
    return _first(-process.episode.idle_rounds, choices.takes_part, fraction)


def _by_channel(process: FederationProcess, choices: Choices, fraction: np.ndarray) -> Flags:
    """Choose who is received best, in the worse of both directions."""
    snr = np.minimum(process.world.snr_down, process.world.snr_up)
    return _first(-snr, choices.takes_part, fraction)


def _by_deadline(process: FederationProcess, choices: Choices, fraction: np.ndarray) -> Flags:
    """Choose as many as are done in time, the fastest first, all with equal shares of the band.

    Source:
        Nishio and Yonetani (2019), Client selection for federated learning with heterogeneous
        resources in mobile edge (FedCS, arXiv:1804.08333), with shares instead of turns.
    """
    able = choices.takes_part

    def done_s(takes_part: Flags) -> Reals:
        share = takes_part / np.maximum(takes_part.sum(-1, keepdims=True), 1)
        demand = process.demand(replace(choices, takes_part=takes_part))
        return process.world.price(replace(demand, share=share)).device_s

    alone_s = done_s(able)
    allowed_s = fraction * alone_s.max(-1)
    chosen = _first(alone_s, able, np.zeros_like(fraction))
    for part in range(1, _COHORTS + 1):
        more = _first(alone_s, able, np.full_like(fraction, part / _COHORTS))
        in_time = done_s(more).max(-1) <= allowed_s
        chosen = np.where(in_time[:, None], more, chosen)
    return chosen


def _first(score: Reals, able: Flags, fraction: Float[np.ndarray, " worlds"]) -> Flags:
    """Return the lowest scores of those who are able: a share of all devices, at least one."""
    count = np.maximum(np.rint(fraction * able.shape[1]), 1)
    order = np.argsort(np.where(able, score, np.inf), axis=-1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(able.shape[1])[None], axis=-1)
    return np.asarray(able & (place < count[:, None]))


Rule = Callable[[FederationProcess, Choices, Float[np.ndarray, " worlds"]], Flags]
RULES: Mapping[str, Rule] = {
    "random": _at_random,
    "round_robin": _in_turn,
    "channel": _by_channel,
    "deadline": _by_deadline,
}
"""Who of those who are able takes part, by the rule's name."""


# --- what a plan is worth ------------------------------------------------------------------------


def episode_returns(
    planner: Planner, env: FederationVectorEnv, *, seed: int
) -> Float[np.ndarray, " worlds"]:
    """Return the return of one episode in each world.

    Args:
        planner: Who chooses.
        env: Worlds, which begin anew.
        seed: Seed of the worlds.
    """
    env.reset(seed=seed)
    returns, running = np.zeros(env.num_envs), np.ones(env.num_envs, dtype=bool)
    while running.any():
        _, rewards, ended, _, _ = env.run_round(planner.choose(env.process))
        returns += rewards * running
        running &= ~ended
    return returns


def tune(env: FederationVectorEnv, rule: str, *, total_steps: int, seed: int) -> FixedPlan:
    """Return the best plan of a rule that so many rounds can find.

    All plans on a grid are tried, then the best quarter again with more episodes each, and so on.

    Args:
        env: Worlds, which begin anew.
        rule: Name of the rule.
        total_steps: Rounds of all worlds together.
        seed: Seed of the worlds.

    Raises:
        WorldError: If not every plan can be tried once.

    Source:
        Karnin et al. (2013), Almost optimal exploration in multi-armed bandits: sequential halving.
    """
    plans = _grid(env, rule)
    horizon, sizes = env.process.settings.horizon, _sizes(len(plans))
    num_batches = total_steps // (horizon * env.num_envs * len(sizes))
    if num_batches * env.num_envs < len(plans):
        raise WorldError(
            f"to tune a plan total_steps must be at least {len(plans) * len(sizes) * horizon:,} "
            f"in batches of {horizon * env.num_envs * len(sizes):,}, got {total_steps:,}"
        )
    for stage, size in enumerate(sizes):
        means = _mean_returns(env, plans, num_batches, seed + stage * num_batches)
        plans = [plans[place] for place in np.argsort(-means, kind="stable")[:size]]
    return plans[0]


def _sizes(count: int) -> list[int]:
    """Return how many plans are left after each stage."""
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // _KEPT_RATIO))
    return sizes[1:] or [1]


def _grid(env: FederationVectorEnv, rule: str) -> list[FixedPlan]:
    process = env.process
    choices = (
        _FRACTIONS,
        range(process.workload.num_rungs),
        range(len(process.settings.local_steps)),
        range(len(process.settings.server_steps)),
        _REALIGN_EVERY if process.settings.realigns else (0,),
    )
    return [FixedPlan(rule, *numbers) for numbers in itertools.product(*choices)]


def _mean_returns(
    env: FederationVectorEnv, plans: Sequence[FixedPlan], num_batches: int, seed: int
) -> Float[np.ndarray, " plans"]:
    """Return the mean return of each plan over as many episodes as there are worlds for it."""
    sums, counts = np.zeros(len(plans)), np.zeros(len(plans))
    for batch in range(num_batches):
        places = (np.arange(env.num_envs) + batch * env.num_envs) % len(plans)
        planner = FixedPlanner(*(plans[int(place)] for place in places))
        np.add.at(sums, places, episode_returns(planner, env, seed=seed + batch))
        np.add.at(counts, places, 1)
    return np.asarray(sums / counts)
