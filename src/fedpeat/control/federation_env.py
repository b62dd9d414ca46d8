"""The controlled process as Gymnasium environments: one federation, or many stepped together."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Int

from fedpeat.control.process import (
    COSTS,
    FARTHEST,
    Choices,
    FederationProcess,
    Observation,
    ProcessSettings,
)
from fedpeat.mec.quality import QualityModel
from fedpeat.mec.workload import WorkloadProfile
from fedpeat.mec.world import WorldSettings

__all__ = ["FederationEnv", "FederationVectorEnv"]

Array = np.ndarray


class FederationVectorEnv(VectorEnv[Observation, Array, Array]):
    """Many federations side by side, stepped together.

    An observation is a dictionary: ``devices`` (worlds, devices, features), ``world`` (worlds,
    features) and ``mask`` (worlds, choices), which is 1 where a choice of a branch is feasible. An
    action has one index for each branch (worlds, branches). A device that is asked for what it
    cannot do sits out. The last round of the horizon ends an episode as a spent budget does: it is
    seen, and nothing counts after it. A world whose episode ends begins the next one in the same
    step; its last observation is ``info["final_obs"]``.

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

    def __init__(
        self,
        world: WorldSettings,
        workload: WorkloadProfile,
        quality: QualityModel,
        settings: ProcessSettings,
        num_envs: int,
        seed: int = 0,
    ) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = num_envs
        self.parts = world, workload, quality, settings
        self.process = FederationProcess(*self.parts, num_envs, seed)
        self.branches = self.process.branches
        sample = self.process.observe()
        self.single_observation_space = spaces.Dict(
            {
                name: spaces.Box(-FARTHEST, FARTHEST, value.shape[1:], np.float32)
                if name != "mask"
                else spaces.MultiBinary(value.shape[1])
                for name, value in sample.items()
            }
        )
        self.single_action_space = spaces.MultiDiscrete(self.branches.sizes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def resized(self, num_envs: int) -> FederationVectorEnv:
        """Return an environment like this one with another number of worlds."""
        return FederationVectorEnv(*self.parts, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin all episodes anew; without a seed the draws go on."""
        if seed is not None:
            self.process.begin(seed)
        else:
            self.process.begin_again(np.ones(self.num_envs, dtype=bool))
        return self.process.observe(), {}

    def step(
        self, actions: Int[np.ndarray, "worlds branches"]
    ) -> tuple[Observation, Array, Array, Array, dict[str, Any]]:
        """Let a round pass in each world."""
        return self.run_round(self.process.read(actions))

    def run_round(
        self, choices: Choices
    ) -> tuple[Observation, Array, Array, Array, dict[str, Any]]:
        """Let a round pass in each world, told in words what to do; returns what ``step`` does."""
        process = self.process
        demand = process.demand(choices)
        cost = process.world.run_round(demand)
        after = process.loss_after(demand, cost.finished)
        rewards = process.rewards(cost, after)
        process.settle(demand, cost, after)
        ended = process.is_over
        info: dict[str, Any] = {
            "loss": after,
            "num_finished": cost.finished.sum(-1),
            **dict(zip(COSTS, cost.totals.T, strict=True)),
        }
        if ended.any():
            info |= {"final_obs": process.observe(), "_final_obs": ended}
            process.begin_again(ended)
        return process.observe(), rewards, ended, np.zeros_like(ended), info


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
