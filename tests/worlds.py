"""Small workloads and worlds for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpeat.mec.quality import QualityModel
from fedpeat.mec.workload import RungLoad, WorkloadProfile
from fedpeat.mec.world import Demand, EdgeWorld, WorldSettings

PARTS = {"common": 3_000_000, "middle": 2_000_000, "upper": 1_000_000}


def rung(name: str, num_parts: int, **changes: Any) -> RungLoad:
    numbers = {
        "adapter_down_bytes": 100_000 * num_parts,
        "adapter_up_bytes": 90_000 * num_parts,
        "step_flops": 5e10 * num_parts,
        "memory_bytes": 2e8 * num_parts,
    }
    return RungLoad(name, dict(list(PARTS.items())[:num_parts]), **(numbers | changes))


def workload(**changes: Any) -> WorkloadProfile:
    rungs = [rung("large", 3), rung("medium", 2), rung("small", 1)]
    return WorkloadProfile(rungs, **({"server_step_flops": 1e13} | changes))


def world(num_worlds: int = 4, seed: int = 0, **changes: Any) -> EdgeWorld:
    settings = WorldSettings(**changes)
    return EdgeWorld(settings, workload(), num_worlds, np.random.default_rng(seed))


def demand(there: EdgeWorld, **changes: Any) -> Demand:
    """Ask everyone who can for 4 steps on the smallest rung, with equal shares of the band."""
    shape = there.present.shape
    able = there.feasible[..., -1]
    count = np.maximum(able.sum(-1, keepdims=True), 1)
    asked: dict[str, Any] = {
        "takes_part": able,
        "rung": np.full(shape, there.workload.num_rungs - 1),
        "local_steps": np.full(shape, 4),
        "share": able / count,
        "server_steps": np.zeros(shape[0], dtype=int),
        "realigns": np.zeros(shape[0], dtype=bool),
    }
    return Demand(**(asked | changes))


def quality() -> QualityModel:
    """Return one member for three rungs, the smallest the slowest and with the highest floor."""
    return QualityModel(
        speed=np.array([[0.05, 0.04, 0.02]]),
        excess=np.array([[0.0, 0.02, 0.1]]),
        skew=np.array([0.05]),
        server_speed=np.array([0.04]),
        steps_power=np.array([0.5]),
        devices_power=np.array([0.5]),
        staleness_decay=np.array([0.02]),
        floor=np.array([2.0]),
    )
