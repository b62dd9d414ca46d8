"""PPO of Stable-Baselines3 on the same worlds, with the same settings as ours where it has them.

It sees the same features and the mask, but does not know that what is masked cannot be done: a
device that is asked for it sits out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.planners import Planner
from fedpeat.control.process import FARTHEST, Choices, FederationProcess
from fedpeat.control.sabppo import SabppoSettings

Curve = list[tuple[int, float, float]]


def train(
    env: FederationVectorEnv, total_steps: int, seed: int
) -> tuple[Planner, FederationVectorEnv, float, Curve]:
    """Train on so many rounds; return who chooses then, where, the seconds, and the curve."""
    ours, watch = SabppoSettings(), _Watch(env.num_envs)
    model = PPO(
        "MlpPolicy",
        _Worlds(env, seed),
        learning_rate=lambda left: ours.learning_rate * left,
        n_steps=ours.num_steps,
        batch_size=env.num_envs * ours.num_steps // ours.num_minibatches,
        n_epochs=ours.update_epochs,
        gamma=ours.gamma,
        gae_lambda=ours.gae_lambda,
        clip_range=ours.clip_coef,
        ent_coef=ours.ent_coef,
        vf_coef=ours.vf_coef,
        max_grad_norm=ours.max_grad_norm,
        policy_kwargs={"net_arch": [128, 128]},
        seed=seed,
        device="cpu",
    )
    model.learn(total_steps, callback=watch)
    return _Chosen(model), env, time.perf_counter() - watch.start, watch.curve


class _Chosen:
    """Follows a trained model, the likeliest choice in each branch."""

    def __init__(self, model: PPO) -> None:
        self._model = model

    def choose(self, process: FederationProcess) -> Choices:
        """Return what everyone is to do in the coming round."""
        actions, _ = self._model.predict(_flat(process.observe()), deterministic=True)
        return process.read(np.asarray(actions))


class _Worlds(VecEnv):
    """Our batched environment, as Stable-Baselines3 wants it."""

    def __init__(self, env: FederationVectorEnv, seed: int) -> None:
        self._env, self._seed = env, seed
        self.render_mode = None
        size = _flat(env.process.observe()).shape[1]
        box = spaces.Box(-FARTHEST, FARTHEST, (size,), np.float32)
        super().__init__(env.num_envs, box, env.single_action_space)

    def reset(self) -> np.ndarray:
        obs, _ = self._env.reset(seed=self._seed)
        return _flat(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        obs, rewards, ended, cut, info = self._env.step(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if "final_obs" in info:
            last = _flat(info["final_obs"])
            for place in np.flatnonzero(ended | cut):
                truncated = bool(cut[place])
                infos[place] = {
                    "terminal_observation": last[place],
                    "TimeLimit.truncated": truncated,
                }
        return _flat(obs), rewards, ended | cut, infos

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Nothing can be set."""

    def env_method(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class _Watch(BaseCallback):
    """Keeps the mean return of the episodes that ended in each rollout."""

    def __init__(self, num_envs: int) -> None:
        super().__init__()
        self.start = time.perf_counter()
        self.curve: Curve = []
        self._running = np.zeros(num_envs)
        self._ended: list[float] = []

    def _on_step(self) -> bool:
        self._running += self.locals["rewards"]
        done = self.locals["dones"]
        self._ended += self._running[done].tolist()
        self._running[done] = 0
        return True

    def _on_rollout_end(self) -> None:
        mean = float(np.mean(self._ended)) if self._ended else math.nan
        self.curve.append((self.num_timesteps, mean, time.perf_counter() - self.start))
        self._ended = []


def _flat(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    parts = [obs["devices"].reshape(len(obs["world"]), -1), obs["world"], obs["mask"]]
    return np.concatenate(parts, axis=1).astype(np.float32)
