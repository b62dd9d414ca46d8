"""What a policy has learnt: how likely it chooses what, by a device's channel and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.policy import Policy
from fedpeat.control.sabppo import PolicyPlanner, tensors_of
from fedpeat.mec.channel import decibels

__all__ = ["habits_of"]

_NUM_BINS = 8


def habits_of(policy: Policy, env: FederationVectorEnv, *, seed: int) -> dict[str, Any]:
    """Return how likely a device takes part, and on which rung with how many steps if it does.

    Episodes are played by the likeliest choices; devices that can do nothing are left out.

    Args:
        policy: The policy.
        env: Worlds, each for one episode.
        seed: Seed of the worlds.

    Returns:
        By ``snr_up_db`` and ``free_memory_gb``: ``centers``, the median of as many devices in each
        of some bins, and the mean probability of each choice there: ``takes_part``, ``rung`` by
        name, and ``local_steps`` by number.
    """
    env.reset(seed=seed)
    planner, process = PolicyPlanner(policy), env.process
    seen: dict[str, list[np.ndarray]] = {"snr_up_db": [], "free_memory_gb": []}
    chosen: list[list[np.ndarray]] = [[] for _ in policy.branches.device]
    for _ in range(process.settings.horizon):
        able = process.world.feasible.any(-1)
        seen["snr_up_db"].append(decibels(process.world.snr_up)[able])
        seen["free_memory_gb"].append(process.world.free_memory_bytes[able] / 1e9)
        with torch.no_grad():
            chances, _ = policy.log_probs(*tensors_of(process.observe()))
        for found, branch in zip(chosen, chances, strict=False):
            found.append(branch.exp().numpy()[able])
        env.run_round(planner.choose(process))
    probabilities = {
        name: np.concatenate(found)
        for name, found in zip(policy.branches.device, chosen, strict=True)
    }
    names = {
        "rung": [rung.name for rung in process.workload.rungs],
        "local_steps": [str(steps) for steps in process.settings.local_steps],
    }
    return {
        name: _binned(np.concatenate(values), probabilities, names) for name, values in seen.items()
    }


def _binned(
    values: Float[np.ndarray, " devices"],
    probabilities: dict[str, np.ndarray],
    names: dict[str, list[str]],
) -> dict[str, Any]:
    bins = np.array_split(np.argsort(values, kind="stable"), _NUM_BINS)
    bins = [places for places in bins if len(places)]

    def means(of: Float[np.ndarray, " devices"]) -> list[float]:
        return [float(of[places].mean()) for places in bins]

    return {
        "centers": [float(np.median(values[places])) for places in bins],
        "takes_part": means(probabilities["takes_part"][:, 1]),
        **{
            branch: {name: means(probabilities[branch][:, i]) for i, name in enumerate(own)}
            for branch, own in names.items()
        },
    }
