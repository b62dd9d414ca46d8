"""The controlled process: rounds of a federation in an edge world, as Gymnasium environments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Int

from fedpeat.core.errors import WorldError
from fedpeat.mec.channel import decibels
from fedpeat.mec.quality import QualityModel, RoundWork
from fedpeat.mec.workload import WorkloadProfile
from fedpeat.mec.world import NONE_HELD, Demand, EdgeWorld, RoundCost, WorldSettings, begun_anew

__all__ = ["Branches", "Choices", "FederationEnv", "FederationVectorEnv", "ProcessSettings"]

Array = np.ndarray
Observation = dict[str, Array]
_COSTS = ("seconds", "joules", "bytes")
_REFERENCE_WORLDS = 2000
_DEVICE_FEATURES = (
    "snr_down",
    "snr_up",
    "flops_per_s",
    "free_memory",
    "battery",
    "examples",
    "idle_rounds",
    "last_loss_over_loss",
    "present",
)
_WORLD_FEATURES = (
    "round",
    "progress",
    "staleness",
    *(f"{name}_left" for name in _COSTS),
)
_FARTHEST = 10.0
"""Bound of each feature of an observation; all are of order 1."""


@dataclass(frozen=True)
class ProcessSettings:
    """What an episode is: how long, what can be chosen, and what it is worth.

    The return of an episode is the share of the way from the starting loss to the floor that was
    gone, minus what it cost: a cost's weight times its ratio to that of as many reference rounds.
    In a reference round everyone who is there tunes on the smallest rung for the middle number of
    steps, with equal shares of the band.

    Attributes:
        horizon: Rounds of an episode.
        local_steps: Numbers of local steps to choose from.
        server_steps: Numbers of the server's own steps to choose from.
        realigns: Whether aligning the emulators anew is a choice.
        bandwidth: Shares of the band: "optimal", with which all finish together; or "branch", in
            proportion to the weights that are chosen.
        bandwidth_weights: Weights to choose from, for "branch".
        start_loss: Loss of the full model before the first round [nat].
        server_examples: Examples that the server trains on itself.
        device_examples: Examples of a device: bounds between which each draws, evenly in logarithm.
        weights: Weight of each cost in the return, of ``seconds``, ``joules`` and ``bytes``.
        budgets: Most of each that an episode may cost, after which it ends; none where not given.
    """

    horizon: int = 30
    local_steps: tuple[int, ...] = (2, 4, 8, 16)
    server_steps: tuple[int, ...] = (0, 4, 8, 16)
    realigns: bool = True
    bandwidth: Literal["optimal", "branch"] = "optimal"
    bandwidth_weights: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    start_loss: float = 3.0
    server_examples: float = 1000.0
    device_examples: tuple[float, float] = (200.0, 2000.0)
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"seconds": 0.2, "joules": 0.1, "bytes": 0.1}
    )
    budgets: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise WorldError(f"horizon of an episode must be at least 1, got {self.horizon}")
        low, high = self.device_examples
        lists = {
            "local_steps": (self.local_steps, 1),
            "server_steps": (self.server_steps, 0),
            "bandwidth_weights": (self.bandwidth_weights, 1e-6),
            "device_examples": ((low, high), 1),
            "server_examples": ((self.server_examples,), 0),
            "start_loss": ((self.start_loss,), -math.inf),
        }
        for name, (values, least) in lists.items():
            if not values or not all(math.isfinite(v) and v >= least for v in values):
                raise WorldError(
                    f"{name} of an episode must be finite and {least:g} or more, got {values}"
                )
        if high < low:
            raise WorldError(f"device_examples of an episode must rise, got {self.device_examples}")
        for name in ("weights", "budgets"):
            numbers: Mapping[str, float] = getattr(self, name)
            if not all(k in _COSTS and v >= 0 for k, v in numbers.items()):
                raise WorldError(
                    f"{name} of an episode must be of {', '.join(_COSTS)} and 0 or more, "
                    f"got {dict(numbers)}"
                )


@dataclass(frozen=True)
class Branches:
    """Sizes of the branches of an action: those of one device over and over, then the server's.

    Attributes:
        device: By name; take part or not, rung, steps, and perhaps bandwidth.
        server: By name; steps, and perhaps alignment.
        num_devices: How often those of a device come.
    """

    device: Mapping[str, int]
    server: Mapping[str, int]
    num_devices: int

    @property
    def sizes(self) -> Int[np.ndarray, " branches"]:
        """Number of choices in each branch of the action."""
        each = np.array([*self.device.values()] * self.num_devices)
        return np.concatenate([each, np.array([*self.server.values()])]).astype(np.int64)


@dataclass(frozen=True)
class Choices:
    """An action in words; indices into what ``ProcessSettings`` allows."""

    takes_part: Bool[np.ndarray, "worlds devices"]
    rung: Int[np.ndarray, "worlds devices"]
    local_steps: Int[np.ndarray, "worlds devices"]
    bandwidth: Int[np.ndarray, "worlds devices"] | None
    server_steps: Int[np.ndarray, " worlds"]
    realigns: Bool[np.ndarray, " worlds"]


@dataclass(frozen=True)
class _Episode:
    """What an episode of each world remembers."""

    member: Int[np.ndarray, " worlds"]
    num_rounds: Int[np.ndarray, " worlds"]
    loss: Float[np.ndarray, " worlds"]
    staleness: Float[np.ndarray, " worlds"]
    spent: Float[np.ndarray, "worlds costs"]
    examples: Float[np.ndarray, "worlds devices"]
    idle_rounds: Float[np.ndarray, "worlds devices"]
    last_loss: Float[np.ndarray, "worlds devices"]


class FederationVectorEnv(VectorEnv[Observation, Array, Array]):
    """Many federations side by side, stepped together.

    An observation is a dictionary: ``devices`` (worlds, devices, features), ``world`` (worlds,
    features) and ``mask`` (worlds, choices), which is 1 where a choice of a branch is feasible. An
    action has one index for each branch (worlds, branches). A device that is asked for what it
    cannot do sits out. A world whose episode ends begins the next one in the same step; its last
    observation is ``info["final_obs"]``.

    Args:
        world: What the cell is like.
        workload: What the federation asks of devices.
        quality: How the loss goes on; each episode follows one member of the ensemble.
        settings: What an episode is.
        num_envs: How many worlds.
        seed: Seed of everything that is drawn, until ``reset`` is given another.

    Raises:
        WorldError: If world, workload and quality do not fit each other.
    """

    _episode: _Episode

    def __init__(
        self,
        world: WorldSettings,
        workload: WorkloadProfile,
        quality: QualityModel,
        settings: ProcessSettings,
        num_envs: int,
        seed: int = 0,
    ) -> None:
        if quality.speed.shape[1] != workload.num_rungs:
            raise WorldError(
                f"a quality model must know the workload's {workload.num_rungs} rungs, got "
                f"{quality.speed.shape[1]}"
            )
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = num_envs
        self._world_settings, self._workload, self._quality = world, workload, quality
        self.settings = settings
        self.branches = self._branches()
        self._reference = self._reference_costs()
        self._least_memory_bytes = max(float(workload.of("memory_bytes").min()), 1.0)
        self._weights = np.array([settings.weights.get(name, 0.0) for name in _COSTS])
        self._budgets = np.array([settings.budgets.get(name, np.inf) for name in _COSTS])
        self._begin(seed)
        sample = self._observe()
        self.single_observation_space = spaces.Dict(
            {
                name: spaces.Box(-_FARTHEST, _FARTHEST, value.shape[1:], np.float32)
                if name != "mask"
                else spaces.MultiBinary(value.shape[1])
                for name, value in sample.items()
            }
        )
        self.single_action_space = spaces.MultiDiscrete(self.branches.sizes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin all episodes anew; without a seed the draws go on."""
        if seed is not None:
            self._begin(seed)
        else:
            self._begin_again(np.ones(self.num_envs, dtype=bool))
        return self._observe(), {}

    def step(
        self, actions: Int[np.ndarray, "worlds branches"]
    ) -> tuple[Observation, Array, Array, Array, dict[str, Any]]:
        """Let a round pass in each world."""
        choices = self.read(actions)
        demand = self._demand(choices)
        episode = self._episode
        before = episode.loss
        staleness = np.where(demand.realigns, 0.0, episode.staleness)
        cost = self.world.run_round(demand)
        work = self._work(demand, cost, staleness)
        after = self._quality.next_loss(before, work, episode.member)
        gap = self.settings.start_loss - self._quality.floor[episode.member]
        costs = np.stack(
            [cost.seconds, cost.device_j.sum(-1), (cost.bytes_down + cost.bytes_up).sum(-1)], -1
        )
        relative = costs / (self._reference * self.settings.horizon)
        rewards = (before - after) / gap - relative @ self._weights
        self._episode = _Episode(
            member=episode.member,
            num_rounds=episode.num_rounds + 1,
            loss=after,
            staleness=staleness + 1,
            spent=episode.spent + costs,
            examples=episode.examples,
            idle_rounds=np.where(cost.finished, 0.0, episode.idle_rounds + 1),
            last_loss=np.where(cost.finished, before[:, None], episode.last_loss),
        )
        terminations = np.asarray((self._episode.spent >= self._budgets).any(-1))
        truncations = ~terminations & (self._episode.num_rounds >= self.settings.horizon)
        info: dict[str, Any] = {
            "loss": after,
            "num_finished": cost.finished.sum(-1),
            **dict(zip(_COSTS, costs.T, strict=True)),
        }
        ended = terminations | truncations
        if ended.any():
            info |= {"final_obs": self._observe(), "_final_obs": ended}
            self._begin_again(ended)
        return self._observe(), rewards, terminations, truncations, info

    def read(self, actions: Int[np.ndarray, "worlds branches"]) -> Choices:
        """Return what actions say, in words; infeasible ones are still in it."""
        names = list(self.branches.device)
        count = self.branches.num_devices * len(names)
        devices = actions[:, :count].reshape(len(actions), -1, len(names))
        chosen = {name: devices[..., i] for i, name in enumerate(names)}
        server = dict(zip(self.branches.server, actions[:, count:].T, strict=True))
        return Choices(
            takes_part=chosen["takes_part"] == 1,
            rung=chosen["rung"],
            local_steps=chosen["local_steps"],
            bandwidth=chosen.get("bandwidth"),
            server_steps=server["server_steps"],
            realigns=server.get("realigns", np.zeros(len(actions))) == 1,
        )

    @property
    def features(self) -> dict[str, list[str]]:
        """Names of the features of a device and of the world, in order."""
        rungs = [rung.name for rung in self._workload.rungs]
        return {
            "devices": [
                *_DEVICE_FEATURES,
                *(f"holds {name}" for name in ("nothing", *rungs)),
                *(f"could hold {name}" for name in rungs),
            ],
            "world": list(_WORLD_FEATURES),
        }

    def _branches(self) -> Branches:
        settings = self.settings
        device = {
            "takes_part": 2,
            "rung": self._workload.num_rungs,
            "local_steps": len(settings.local_steps),
        }
        if settings.bandwidth == "branch":
            device["bandwidth"] = len(settings.bandwidth_weights)
        server = {"server_steps": len(settings.server_steps)}
        if settings.realigns:
            server["realigns"] = 2
        return Branches(device, server, self._world_settings.num_devices)

    def _begin(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.world = EdgeWorld(self._world_settings, self._workload, self.num_envs, self._rng)
        self._episode = self._new_episode()

    def _begin_again(self, which: Bool[np.ndarray, " worlds"]) -> None:
        self.world.reset(which)
        self._episode = begun_anew(which, self._episode, self._new_episode())

    def _new_episode(self) -> _Episode:
        worlds, devices = self.num_envs, self._world_settings.num_devices
        low, high = np.log(self.settings.device_examples)
        start = np.full(worlds, float(self.settings.start_loss))
        return _Episode(
            member=self._rng.integers(self._quality.num_members, size=worlds),
            num_rounds=np.zeros(worlds, dtype=np.int64),
            loss=start,
            staleness=np.zeros(worlds),
            spent=np.zeros((worlds, len(_COSTS))),
            examples=np.exp(self._rng.uniform(low, high, (worlds, devices))),
            idle_rounds=np.zeros((worlds, devices)),
            last_loss=np.repeat(start[:, None], devices, axis=1),
        )

    def _demand(self, choices: Choices) -> Demand:
        settings = self.settings
        feasible = np.take_along_axis(self.world.feasible, choices.rung[..., None], -1)[..., 0]
        takes_part = choices.takes_part & feasible
        share = None
        if choices.bandwidth is not None:
            weights = np.asarray(settings.bandwidth_weights)[choices.bandwidth] * takes_part
            share = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
        return Demand(
            takes_part=takes_part,
            rung=choices.rung,
            local_steps=np.asarray(settings.local_steps)[choices.local_steps],
            share=share,
            server_steps=np.asarray(settings.server_steps)[choices.server_steps],
            realigns=choices.realigns,
        )

    def _work(self, demand: Demand, cost: RoundCost, staleness: Array) -> RoundWork:
        """Return what the updates that came back are made of."""
        counted = self._episode.examples * cost.finished
        total = counted.sum(-1)
        safe = np.maximum(total, 1e-12)
        own = self.settings.server_examples * (demand.server_steps > 0)
        on_rung = demand.rung[..., None] == np.arange(self._workload.num_rungs)
        return RoundWork(
            rung_share=(counted[..., None] * on_rung).sum(1) / safe[:, None],
            num_effective=total**2 / np.maximum((counted**2).sum(-1), 1e-12),
            local_steps=(counted * demand.local_steps).sum(-1) / safe,
            server_share=own / np.maximum(own + total, 1e-12),
            server_steps=demand.server_steps.astype(float),
            staleness=staleness,
        )

    def _observe(self) -> Observation:
        world, episode, settings = self.world, self._episode, self.settings
        held = world.held[..., None] == np.array([NONE_HELD, *range(self._workload.num_rungs)])
        per_device = [
            decibels(world.snr_down) / 20,
            decibels(world.snr_up) / 20,
            np.log10(world.flops_per_s) - 10,
            np.log10(world.free_memory_bytes / self._least_memory_bytes),
            world.battery_ratio,
            np.log(episode.examples / math.sqrt(math.prod(settings.device_examples))),
            np.minimum(episode.idle_rounds, 10) / 10,
            episode.last_loss - episode.loss[:, None],
            world.present,
        ]
        gap = settings.start_loss - self._quality.floor.mean()
        left = np.where(
            np.isfinite(self._budgets), 1 - episode.spent / np.maximum(self._budgets, 1e-12), 1.0
        )
        of_world = np.column_stack(
            [
                episode.num_rounds / settings.horizon,
                (settings.start_loss - episode.loss) / gap,
                np.minimum(episode.staleness, 20) / 20,
                left,
            ]
        )
        devices = np.concatenate([np.stack(per_device, -1), held, world.feasible], axis=-1)
        return {
            "devices": devices.clip(-_FARTHEST, _FARTHEST).astype(np.float32),
            "world": of_world.clip(-_FARTHEST, _FARTHEST).astype(np.float32),
            "mask": self._mask(),
        }

    def _mask(self) -> Int[np.ndarray, "worlds choices"]:
        """Return which choices of each branch are feasible, branch after branch.

        A device that can hold nothing can only stay out; what it would do otherwise is open.
        """
        feasible = self.world.feasible
        able = feasible.any(-1, keepdims=True)
        parts = {
            "takes_part": np.concatenate([np.ones_like(able), able], axis=-1),
            "rung": feasible | ~able,
        }
        shape = feasible.shape[:2]
        columns = [
            parts.get(name, np.ones((*shape, size), dtype=bool))
            for name, size in self.branches.device.items()
        ]
        devices = np.concatenate(columns, axis=-1).reshape(shape[0], -1)
        server = np.ones((shape[0], sum(self.branches.server.values())), dtype=bool)
        return np.concatenate([devices, server], axis=-1).astype(np.int8)

    def _reference_costs(self) -> Float[np.ndarray, " costs"]:
        """Return the mean costs of a reference round that sends no emulator."""
        rng = np.random.default_rng(0)
        world = EdgeWorld(self._world_settings, self._workload, _REFERENCE_WORLDS, rng)
        steps = self.settings.local_steps[len(self.settings.local_steps) // 2]
        for _ in range(2):  # the first one sends the emulators
            able = world.feasible[..., -1]
            cost = world.run_round(
                Demand(
                    takes_part=able,
                    rung=np.full(able.shape, self._workload.num_rungs - 1),
                    local_steps=np.full(able.shape, steps),
                    share=able / np.maximum(able.sum(-1, keepdims=True), 1),
                    server_steps=np.zeros(len(able), dtype=np.int64),
                    realigns=np.zeros(len(able), dtype=bool),
                )
            )
        moved = (cost.bytes_down + cost.bytes_up).sum(-1)
        costs = np.array([np.median(c) for c in (cost.seconds, cost.device_j.sum(-1), moved)])
        return np.asarray(np.maximum(costs, 1e-12))


class FederationEnv(gym.Env[Observation, Array]):
    """One federation; see ``FederationVectorEnv``, of which it is one world.

    Args:
        world: What the cell is like.
        workload: What the federation asks of devices.
        quality: How the loss goes on.
        settings: What an episode is.
    """

    def __init__(
        self,
        world: WorldSettings,
        workload: WorkloadProfile,
        quality: QualityModel,
        settings: ProcessSettings,
    ) -> None:
        self._many = FederationVectorEnv(world, workload, quality, settings, num_envs=1)
        self.observation_space = self._many.single_observation_space
        self.action_space = self._many.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        observation, info = self._many.reset(seed=seed)
        return _first(observation), info

    def step(self, action: Array) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Let a round pass."""
        observation, rewards, ended, cut, info = self._many.step(np.asarray(action)[None])
        last = info.pop("final_obs", observation)
        info.pop("_final_obs", None)
        numbers = {name: float(value[0]) for name, value in info.items()}
        return _first(last), float(rewards[0]), bool(ended[0]), bool(cut[0]), numbers


def _first(observation: Observation) -> Observation:
    return {name: value[0] for name, value in observation.items()}
