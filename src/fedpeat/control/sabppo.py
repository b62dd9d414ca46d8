"""SABPPO: one agent, PPO, an action of many branches.

The branches of an action are independent categoricals given the observation, which is also what PPO
on a MultiDiscrete space does. What differs here: the ratio is clipped branch by branch, so that the
trust region of one branch does not shrink with the number of devices; choices that are not feasible
are masked; and what a device that stays out would have done is left out of the loss, since nothing
depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.policy import NetworkKind, Policy, choose, make_policy
from fedpeat.control.process import Choices, FederationProcess, Observation
from fedpeat.core.errors import ConfigError

__all__ = ["PolicyPlanner", "Progress", "SabppoSettings", "tensors_of", "train_sabppo"]

_MOST_REWARD = 1.0
"""What a round counts at most either way: all that there is to gain. Somebody in a deep fade may
cost a hundred times as much, and would drown everything else."""


@dataclass(frozen=True)
class SabppoSettings:
    """How a policy is trained.

    Attributes:
        total_steps: Rounds of all worlds together.
        num_steps: Rounds of each world between two updates.
        learning_rate: Step size of Adam, falling to 0 in a line.
        gamma: Discount of a round; an episode's horizon is known, so there need be none.
        gae_lambda: Decay of generalised advantages.
        num_minibatches: Parts of what was collected, one gradient step each.
        update_epochs: Times that all is gone through.
        clip_coef: How far a ratio may move from 1.
        ent_coef: Weight of the entropy, each branch's in units of the most that it can have.
        vf_coef: Weight of the value's squared error.
        max_grad_norm: Longest gradient.
        ratio: "branch" clips the ratio of each branch, "joint" that of the whole action.
        network: "set" for any number of devices, "mlp" for a fixed one.
        seed: Seed of weights and draws.

    Source:
        Schulman et al. (2017), Proximal policy optimization; defaults of Huang et al. (2022),
        CleanRL, where ours are no other.
    """

    total_steps: int = 1_000_000
    num_steps: int = 32
    learning_rate: float = 1e-3
    gamma: float = 1.0
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 4
    clip_coef: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    ratio: Literal["branch", "joint"] = "branch"
    network: NetworkKind = "set"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_steps", "num_minibatches", "update_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sabppo.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_coef", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"sabppo.{name} must be above 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"sabppo.{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class Progress:
    """One line of the training log.

    Attributes:
        num_steps: Rounds so far, of all worlds together.
        mean_return: Mean return of the episodes that ended since the last line; NaN if none did.
        policy_loss: Mean clipped objective, its sign turned.
        value_loss: Mean squared error of the value, in units of the returns' deviation.
        entropy: Mean entropy of the branches, each in units of the most that it can have.
        kl: Mean divergence of the policy from the one that collected, per branch [nat].
        clipped_ratio: Share of the ratios that were clipped.
    """

    num_steps: int
    mean_return: float
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clipped_ratio: float


def train_sabppo(  # noqa: PLR0915 - an algorithm is read top to bottom, in the order of CleanRL
    env: FederationVectorEnv,
    settings: SabppoSettings,
    watch: Callable[[Progress], None] | None = None,
) -> Policy:
    """Train a policy.

    Args:
        env: Worlds, which begin anew.
        settings: How to train.
        watch: Is told of each update.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    obs, _ = env.reset(seed=settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        policy = make_policy(settings.network, env.process)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
    batch_size = env.num_envs * settings.num_steps
    num_updates = max(1, settings.total_steps // batch_size)
    scale = _Scale(env.num_envs, settings.gamma)
    returns = np.zeros(env.num_envs)
    for update in range(num_updates):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - update / num_updates)

        # 1. Collect.
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        taken: list[list[Tensor]] = []
        log_probs: list[list[Tensor]] = []
        values: list[Tensor] = []
        rewards: list[Tensor] = []
        ends: list[Tensor] = []
        finished: list[float] = []
        for _ in range(settings.num_steps):
            tensors = tensors_of(obs)
            policy.see(*tensors[:2])
            with torch.no_grad():
                chances, value = policy.log_probs(*tensors)
            choices = choose(chances, generator)
            obs, reward, done, _, _ = env.step(policy.action(choices).numpy())
            returns += reward
            bounded = reward.clip(-_MOST_REWARD, _MOST_REWARD)
            scaled = torch.from_numpy(scale.seen(bounded, done)).float()
            finished += returns[done].tolist()
            returns[done] = 0
            seen.append(tensors)
            taken.append(choices)
            log_probs.append(_taken(chances, choices))
            values.append(value)
            rewards.append(scaled)
            ends.append(torch.from_numpy(done))

        # 2. Advantages.
        with torch.no_grad():
            _, value = policy.log_probs(*tensors_of(obs))
        values.append(value)
        advantages = _advantages(rewards, values, ends, settings.gamma, settings.gae_lambda)
        targets = advantages + torch.stack(values[:-1])

        # 3. Flatten.
        flat_seen = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        flat_taken = [torch.cat(parts) for parts in zip(*taken, strict=True)]
        flat_log_probs = [torch.cat(parts) for parts in zip(*log_probs, strict=True)]
        flat_advantages, flat_targets = advantages.flatten(), targets.flatten()

        # 4. Update.
        notes: list[tuple[float, ...]] = []
        for _ in range(settings.update_epochs):
            order = torch.randperm(batch_size, generator=generator)
            for rows in order.chunk(settings.num_minibatches):
                chances, value = policy.log_probs(*(part[rows] for part in flat_seen))
                choices = [part[rows] for part in flat_taken]
                advantage = flat_advantages[rows]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                relevant = _relevant(policy, choices)
                differences = [
                    (new - old[rows]) * own
                    for new, old, own in zip(
                        _taken(chances, choices), flat_log_probs, relevant, strict=True
                    )
                ]
                policy_loss, clipped, kl = _clipped_loss(differences, relevant, advantage, settings)
                value_loss = (value - flat_targets[rows]).square().mean()
                total, entropy = _entropy(chances, relevant)
                loss = policy_loss + settings.vf_coef * value_loss - settings.ent_coef * total
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
                optimizer.step()
                numbers = (policy_loss, value_loss, entropy, kl, clipped)
                notes.append(tuple(float(number.detach()) for number in numbers))

        # 5. Log.
        if watch is not None:
            mean_return = float(np.mean(finished)) if finished else math.nan
            means = (float(mean) for mean in np.mean(notes, axis=0))
            watch(Progress((update + 1) * batch_size, mean_return, *means))
    return policy


class PolicyPlanner:
    """Follows a policy.

    Args:
        policy: The policy.
        sample: Whether to draw choices, from the process's stream; the likeliest are taken if not.
    """

    def __init__(self, policy: Policy, *, sample: bool = False) -> None:
        self._policy = policy
        self._sample = sample

    def choose(self, process: FederationProcess) -> Choices:
        """Return what everyone is to do in the coming round."""
        with torch.no_grad():
            chances, _ = self._policy.log_probs(*tensors_of(process.observe()))
        generator = None
        if self._sample:
            generator = torch.Generator().manual_seed(int(process.rng.integers(2**63)))
        return process.read(self._policy.action(choose(chances, generator)).numpy())


def tensors_of(obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """Return an observation as a policy takes it: devices, world, mask."""
    devices, world = (torch.from_numpy(obs[name]) for name in ("devices", "world"))
    return devices, world, torch.from_numpy(obs["mask"]).bool()


def _taken(chances: list[Tensor], choices: list[Tensor]) -> list[Tensor]:
    """Return the log probability of each choice that was made, by branch."""
    return [
        chance.gather(-1, choice[..., None]).squeeze(-1)
        for chance, choice in zip(chances, choices, strict=True)
    ]


def _relevant(policy: Policy, choices: list[Tensor]) -> list[Tensor]:
    """Return which choices could make a difference: not what a device that stays out would do."""
    names = list(policy.branches.device)
    takes_part = choices[names.index("takes_part")] == 1
    everyone = torch.ones_like(takes_part)
    devices = [everyone if name == "takes_part" else takes_part for name in names]
    return devices + [torch.ones_like(c, dtype=torch.bool) for c in choices[len(names) :]]


def _clipped_loss(
    differences: list[Tensor], relevant: list[Tensor], advantage: Tensor, settings: SabppoSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PPO's clipped objective with its sign turned, the share clipped, and the divergence.

    Branch by branch the objective is a sum over branches, so that at a ratio of 1 its gradient is
    that of the joint one; only the clipping differs.
    """
    logs = torch.cat(differences, dim=1)
    counted = torch.cat(relevant, dim=1)
    if settings.ratio == "joint":
        logs, counted = logs.sum(1, keepdim=True), torch.ones_like(counted[:, :1])
    ratio, gain = logs.exp(), advantage[:, None]
    bounded = ratio.clamp(1 - settings.clip_coef, 1 + settings.clip_coef)
    objective = torch.minimum(ratio * gain, bounded * gain) * counted
    total = counted.sum().clamp(min=1)
    with torch.no_grad():
        clipped = (((ratio - 1).abs() > settings.clip_coef) & counted).sum() / total
        kl = ((ratio - 1 - logs) * counted).sum() / total
    return -objective.sum(1).mean(), clipped, kl


def _entropy(chances: list[Tensor], relevant: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the entropies of all branches, each over the logarithm of its size: sum and mean.

    The sum, of a world on average, is what an objective that sums over branches is to be weighed
    against: a branch then explores as much whether there are 5 devices or 500.
    """
    entropies = [
        (-(chance.exp() * chance).sum(-1) / math.log(chance.shape[-1]), own)
        for chance, own in zip(chances, relevant, strict=True)
        if chance.shape[-1] > 1
    ]
    values = torch.cat([value for value, _ in entropies], dim=1)
    counted = torch.cat([own for _, own in entropies], dim=1)
    total = (values * counted).sum()
    return total / len(values), total / counted.sum().clamp(min=1)


def _advantages(
    rewards: list[Tensor], values: list[Tensor], ends: list[Tensor], gamma: float, decay: float
) -> Float[Tensor, "steps worlds"]:
    """Return generalised advantages; nothing is carried over the end of an episode.

    Source:
        Schulman et al. (2016), High-dimensional continuous control using generalized advantage
        estimation.
    """
    advantage = torch.zeros_like(values[0])
    found: list[Tensor] = []
    for step in reversed(range(len(rewards))):
        goes_on = (~ends[step]).float()
        error = rewards[step] + gamma * values[step + 1] * goes_on - values[step]
        advantage = error + gamma * decay * goes_on * advantage
        found.append(advantage)
    return torch.stack(found[::-1])


class _Scale:
    """Scales rewards by the deviation of the discounted return so far."""

    def __init__(self, num_envs: int, gamma: float) -> None:
        self._gamma = gamma
        self._running = np.zeros(num_envs)
        self._sums = np.zeros(3)  # count, sum, sum of squares

    def seen(self, reward: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Return scaled rewards, these counted."""
        self._running = self._gamma * self._running + reward
        counts = [len(reward), self._running.sum(), (self._running**2).sum()]
        self._sums += np.array(counts)
        self._running[done] = 0
        count, total, squares = self._sums
        variance = squares / count - (total / count) ** 2
        return np.asarray(reward / math.sqrt(max(variance, 1e-8)))
