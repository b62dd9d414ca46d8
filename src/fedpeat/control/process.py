"""The controlled process: rounds of federations in edge worlds, what of them is seen, chosen, paid.

Environments in which a policy learns and the run of a real federation go through it alike: where
the one asks a model of quality how the loss goes on, the other measures it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from fedpeat.core.errors import CheckpointError, WorldError
from fedpeat.mec.channel import decibels
from fedpeat.mec.quality import QualityModel, RoundWork, effective_number, recent_shares
from fedpeat.mec.workload import WorkloadProfile
from fedpeat.mec.world import (
    NONE_HELD,
    Demand,
    EdgeWorld,
    RoundCost,
    WorldSettings,
    begun_anew,
    picked_rows,
)

__all__ = [
    "COSTS",
    "FARTHEST",
    "Branches",
    "Choices",
    "Episode",
    "FederationProcess",
    "Observation",
    "ProcessSettings",
]

Array = np.ndarray
Observation = dict[str, Array]
COSTS = ("seconds", "joules", "bytes")
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
    "recent_share",
    "present",
)
_WORLD_FEATURES = (
    "round",
    "progress",
    "staleness",
    *(f"{name}_left" for name in COSTS),
)
FARTHEST = 10.0
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
        server_weight_ratio: Share of the average that is the server's where devices take part too;
            by its examples if not given.
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
    server_weight_ratio: float | None = None
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
            if not all(k in COSTS and v >= 0 for k, v in numbers.items()):
                raise WorldError(
                    f"{name} of an episode must be of {', '.join(COSTS)} and 0 or more, "
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
class Episode:
    """What an episode of each world remembers."""

    member: Int[np.ndarray, " worlds"]
    num_rounds: Int[np.ndarray, " worlds"]
    loss: Float[np.ndarray, " worlds"]
    staleness: Float[np.ndarray, " worlds"]
    spent: Float[np.ndarray, "worlds costs"]
    examples: Float[np.ndarray, "worlds devices"]
    idle_rounds: Float[np.ndarray, "worlds devices"]
    last_loss: Float[np.ndarray, "worlds devices"]
    recent: Float[np.ndarray, "worlds devices"]


class FederationProcess:
    """Federations side by side in their worlds.

    Attributes:
        world: Where they are.
        episode: What their episodes remember.
        branches: Branches of an action.
        reference: Cost of a reference round: time [s], energy [J], bytes.
        rng: Every draw comes from it.

    Args:
        world: What the cell is like.
        workload: What the federation asks of devices.
        quality: How the loss goes on; each episode follows one member of the ensemble.
        settings: What an episode is.
        num_worlds: How many.
        seed: Seed of all that is drawn, until ``begin`` is given another.

    Raises:
        WorldError: If world, workload and quality do not fit each other.
    """

    def __init__(
        self,
        world: WorldSettings,
        workload: WorkloadProfile,
        quality: QualityModel,
        settings: ProcessSettings,
        num_worlds: int,
        seed: int = 0,
    ) -> None:
        if quality.speed.shape[1] != workload.num_rungs:
            raise WorldError(
                f"a quality model must know the workload's {workload.num_rungs} rungs, got "
                f"{quality.speed.shape[1]}"
            )
        self.workload, self.quality, self.settings = workload, quality, settings
        self.num_worlds, self.num_devices = num_worlds, world.num_devices
        self.branches = self._branches()
        self.reference = self._reference_costs(world)
        self._least_memory_bytes = max(float(workload.of("memory_bytes").min()), 1.0)
        self._weights = np.array([settings.weights.get(name, 0.0) for name in COSTS])
        self._budgets = np.array([settings.budgets.get(name, np.inf) for name in COSTS])
        self._world_settings = world
        self.begin(seed)

    def begin(self, seed: int) -> None:
        """Begin all episodes anew, all draws from a seed."""
        self.rng = np.random.default_rng(seed)
        self.world = EdgeWorld(self._world_settings, self.workload, self.num_worlds, self.rng)
        self.episode = self._new_episode()

    @property
    def gap(self) -> Float[np.ndarray, " worlds"]:
        """How far the loss could fall in each episode [nat]."""
        floor = self.quality.floor[self.episode.member]
        return np.asarray(self.settings.start_loss - floor)

    def state(self) -> dict[str, Any]:
        """Return where it stands as plain JSON data, to the last bit."""
        arrays = {**self.world.state(), **vars(self.episode)}
        return {
            "arrays": {name: _packed(array) for name, array in arrays.items()},
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned.

        Raises:
            CheckpointError: If it is of other worlds.
        """
        try:
            arrays = {name: _unpacked(packed) for name, packed in state["arrays"].items()}
            shapes = {name: array.shape for name, array in arrays.items()}
            own = {**self.world.state(), **vars(self.episode)}
            if shapes != {name: array.shape for name, array in own.items()}:
                raise CheckpointError("the state of the simulated world is of other devices")
            self.world.load_state(arrays)
            self.episode = Episode(**{name: arrays[name] for name in vars(self.episode)})
            self.rng.bit_generator.state = state["rng"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the state of the simulated world is damaged: {error}"
            ) from error

    def begin_again(self, which: Bool[np.ndarray, " worlds"]) -> None:
        """Begin another episode in some of the worlds, with other devices."""
        self.world.reset(which)
        self.episode = begun_anew(which, self.episode, self._new_episode())

    def loss_after(
        self,
        demand: Demand,
        finished: Bool[np.ndarray, "worlds devices"],
        quality: QualityModel | None = None,
    ) -> Float[np.ndarray, " worlds"]:
        """Return the loss that a round leaves.

        Args:
            demand: What was asked of everyone.
            finished: Whose update came back.
            quality: What foretells it, with one member; each episode's own if not given.
        """
        episode = self.episode
        member = episode.member if quality is None else np.zeros_like(episode.member)
        work = self.work(demand, finished)
        return (quality or self.quality).next_loss(episode.loss, work, member)

    def rewards(
        self, cost: RoundCost, after: Float[np.ndarray, " worlds"]
    ) -> Float[np.ndarray, " worlds"]:
        """Return what a round was worth, by its cost and the loss that it left."""
        relative = cost.totals / (self.reference * self.settings.horizon)
        return np.asarray((self.episode.loss - after) / self.gap - relative @ self._weights)

    def settle(self, demand: Demand, cost: RoundCost, after: Float[np.ndarray, " worlds"]) -> None:
        """Put a round that has passed down to the episodes, the loss that it left with it."""
        episode = self.episode
        before = np.where(cost.finished, episode.loss[:, None], episode.last_loss)
        self.episode = replace(
            episode,
            num_rounds=episode.num_rounds + 1,
            loss=after,
            staleness=np.where(demand.realigns, 0.0, episode.staleness) + 1,
            spent=episode.spent + cost.totals,
            idle_rounds=np.where(cost.finished, 0.0, episode.idle_rounds + 1),
            last_loss=before,
            recent=recent_shares(episode.recent, episode.examples * cost.finished),
        )

    @property
    def is_over(self) -> Bool[np.ndarray, " worlds"]:
        """Which episodes have had all their rounds, or spent all that they may of something."""
        spent = (self.episode.spent >= self._budgets).any(-1)
        return np.asarray(spent | (self.episode.num_rounds >= self.settings.horizon))

    def picked(self, rows: Int[np.ndarray, " picked"]) -> FederationProcess:
        """Return a process of its own that goes on from some of the worlds, perhaps repeated."""
        other = copy.copy(self)
        other.num_worlds = len(rows)
        other.world = self.world.picked(rows)
        other.episode = picked_rows(rows, self.episode)
        return other

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
        rungs = [rung.name for rung in self.workload.rungs]
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
            "rung": self.workload.num_rungs,
            "local_steps": len(settings.local_steps),
        }
        if settings.bandwidth == "branch":
            device["bandwidth"] = len(settings.bandwidth_weights)
        server = {"server_steps": len(settings.server_steps)}
        if settings.realigns:
            server["realigns"] = 2
        return Branches(device, server, self.num_devices)

    def _new_episode(self) -> Episode:
        worlds, devices = self.num_worlds, self.num_devices
        low, high = np.log(self.settings.device_examples)
        start = np.full(worlds, float(self.settings.start_loss))
        return Episode(
            member=self.rng.integers(self.quality.num_members, size=worlds),
            num_rounds=np.zeros(worlds, dtype=np.int64),
            loss=start,
            staleness=np.zeros(worlds),
            spent=np.zeros((worlds, len(COSTS))),
            examples=np.exp(self.rng.uniform(low, high, (worlds, devices))),
            idle_rounds=np.zeros((worlds, devices)),
            last_loss=np.repeat(start[:, None], devices, axis=1),
            recent=np.zeros((worlds, devices)),
        )

    def demand(self, choices: Choices) -> Demand:
        """Return what is asked of everyone; a device that cannot do what was chosen sits out."""
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

    def work(self, demand: Demand, finished: Bool[np.ndarray, "worlds devices"]) -> RoundWork:
        """Return what the updates that came back are made of."""
        counted = self.episode.examples * finished
        total = counted.sum(-1)
        safe = np.maximum(total, 1e-12)
        trains = demand.server_steps > 0
        own = self.settings.server_examples * trains
        server_share = own / np.maximum(own + total, 1e-12)
        if (ratio := self.settings.server_weight_ratio) is not None:
            server_share = np.where(trains & (total > 0), ratio, trains)
        on_rung = demand.rung[..., None] == np.arange(self.workload.num_rungs)
        return RoundWork(
            rung_share=(counted[..., None] * on_rung).sum(1) / safe[:, None],
            num_effective=effective_number(counted),
            local_steps=(counted * demand.local_steps).sum(-1) / safe,
            server_share=server_share.astype(float),
            server_steps=demand.server_steps.astype(float),
            staleness=np.where(demand.realigns, 0.0, self.episode.staleness),
            num_recent=effective_number(recent_shares(self.episode.recent, counted)),
        )

    def observe(self) -> Observation:
        """Return what a controller sees; see ``FederationVectorEnv``."""
        world, episode, settings = self.world, self.episode, self.settings
        held = world.held[..., None] == np.array([NONE_HELD, *range(self.workload.num_rungs)])
        per_device = [
            decibels(world.snr_down) / 20,
            decibels(world.snr_up) / 20,
            np.log10(world.flops_per_s) - 10,
            np.log10(world.free_memory_bytes / self._least_memory_bytes),
            world.battery_ratio,
            np.log(episode.examples / math.sqrt(math.prod(settings.device_examples))),
            np.minimum(episode.idle_rounds, 10) / 10,
            episode.last_loss - episode.loss[:, None],
            episode.recent / np.maximum(episode.recent.sum(-1, keepdims=True), 1e-12),
            world.present,
        ]
        gap = settings.start_loss - self.quality.floor.mean()
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
            "devices": devices.clip(-FARTHEST, FARTHEST).astype(np.float32),
            "world": of_world.clip(-FARTHEST, FARTHEST).astype(np.float32),
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

    def _reference_costs(self, settings: WorldSettings) -> Float[np.ndarray, " costs"]:
        """Return the mean costs of a reference round that sends no emulator."""
        rng = np.random.default_rng(0)
        world = EdgeWorld(settings, self.workload, _REFERENCE_WORLDS, rng)
        steps = self.settings.local_steps[len(self.settings.local_steps) // 2]
        for _ in range(2):  # the first one sends the emulators
            able = world.feasible[..., -1]
            cost = world.run_round(
                Demand(
                    takes_part=able,
                    rung=np.full(able.shape, self.workload.num_rungs - 1),
                    local_steps=np.full(able.shape, steps),
                    share=able / np.maximum(able.sum(-1, keepdims=True), 1),
                    server_steps=np.zeros(len(able), dtype=np.int64),
                    realigns=np.zeros(len(able), dtype=bool),
                )
            )
        return np.asarray(np.maximum(np.median(cost.totals, axis=0), 1e-12))


def _packed(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "hex": array.tobytes().hex()}


def _unpacked(record: Mapping[str, Any]) -> np.ndarray:
    flat = np.frombuffer(bytes.fromhex(record["hex"]), np.dtype(record["dtype"]))
    return flat.reshape(record["shape"]).copy()
