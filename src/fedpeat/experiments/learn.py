"""Train controllers in the simulated world of a calibration."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fedpeat.config.schema import Config, ControllerKind
from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.habits import habits_of
from fedpeat.control.planners import RULES, Planner, episode_returns, tune
from fedpeat.control.policy import Policy
from fedpeat.control.quality_fit import load_quality
from fedpeat.control.sabppo import PolicyPlanner, Progress, SabppoSettings, train_sabppo
from fedpeat.control.trained import Trained, save_trained
from fedpeat.core.errors import CheckpointError
from fedpeat.core.run_folder import storage_errors
from fedpeat.core.seeds import derive_seed
from fedpeat.experiments.calibrate import FACTS
from fedpeat.experiments.observer import Observer, Silent
from fedpeat.experiments.steering import planner_of, process_settings, world_settings
from fedpeat.mec.workload import WorkloadProfile

__all__ = ["learn", "world_of"]

_NUM_JUDGES = 1000


def world_of(config: Config, calibration: Path) -> FederationVectorEnv:
    """Return the simulated world of a calibration, with the settings of a run.

    Args:
        config: Settings of the world, of controllers, and of the rounds.
        calibration: Folder that ``calibrate`` wrote.

    Raises:
        CalibrationError: If the fit is missing, damaged, or too far off.
        CheckpointError: If the rest is missing or damaged.
        WorldError: If the world cannot be.
    """
    path = calibration / FACTS
    try:
        facts = json.loads(path.read_text())
        workload = WorkloadProfile.from_record(facts["workload"])
        low, high = facts["device_examples"]
        settings = process_settings(
            config,
            start_loss=float(facts["start_loss"]),
            device_examples=(float(low), float(high)),
            server_examples=float(facts["server_examples"]),
        )
        num_devices = int(facts["num_devices"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read calibration {path}: {error!r}") from error
    names = [rung.name for rung in workload.rungs]
    quality, _ = load_quality(calibration, names, config.calibration.max_error)
    world = world_settings(config, num_devices)
    return FederationVectorEnv(
        world, workload, quality, settings, config.controller.num_envs, config.seed
    )


def learn(
    config: Config, calibration: Path, *, observer: Observer | None = None
) -> tuple[Path, dict[str, Any]]:
    """Tune the plan of every rule and train a policy, each on as many simulated rounds.

    Args:
        config: Settings of the world, of controllers, and of the rounds.
        calibration: Folder that ``calibrate`` wrote.
        observer: Is told what goes on.

    Returns:
        The folder ``controller`` in that of the calibration, and what is worth knowing: ``seconds``
        that each took, ``curves`` of training, ``returns`` of all controllers in worlds that none
        was trained in, with 95 % intervals, and the policy's ``habits``.

    Raises:
        FedPEATError: As ``world_of``; or if there are too few rounds to tune a plan on.
    """
    observer = observer or Silent()
    env = world_of(config, calibration)
    control, folder = config.controller, calibration / "controller"
    seconds: dict[str, float] = {}
    plans = {}
    for rule in RULES:
        observer.message(f"tuning the plan of {rule} on {control.total_steps:,} simulated rounds")
        start = time.perf_counter()
        plans[rule] = tune(env, rule, total_steps=control.total_steps, seed=config.seed)
        seconds[rule] = time.perf_counter() - start
    start = time.perf_counter()
    policies, curves = zip(
        *(_trained(config, env, place, observer) for place in range(control.num_policies)),
        strict=True,
    )
    seconds["sabppo"] = (time.perf_counter() - start) / control.num_policies
    judge, seed = env.resized(_NUM_JUDGES), derive_seed(config.seed, "choice of a policy")
    worths = [episode_returns(PolicyPlanner(p), judge, seed=seed).mean() for p in policies]
    policy = policies[int(np.argmax(worths))]
    trained = Trained(env.process.settings, env.process.quality, plans)
    returns = _returns(config, env, trained, policy)
    habits = habits_of(policy, env, seed=derive_seed(config.seed, "habits"))
    facts = {"seconds": seconds, "curves": curves, "returns": returns, "habits": habits}
    with storage_errors(folder):
        save_trained(folder, trained, policy, env.process, facts)
    return folder, facts


def _trained(
    config: Config, env: FederationVectorEnv, place: int, observer: Observer
) -> tuple[Policy, list[dict[str, float]]]:
    """Train one policy; return it, and its returns along the way."""
    control = config.controller
    curve: list[dict[str, float]] = []

    def watch(line: Progress) -> None:
        curve.append({"num_steps": line.num_steps, "mean_return": line.mean_return})
        told = f"return {line.mean_return:.3f}, entropy {line.entropy:.2f}"
        observer.progress(f"policy {place + 1}", line.num_steps, control.total_steps, told)

    observer.message(f"training a policy on {control.total_steps:,} simulated rounds")
    settings = SabppoSettings(
        total_steps=control.total_steps,
        network=control.network,
        ratio=control.ratio,
        seed=derive_seed(config.seed, "policy", place),
    )
    return train_sabppo(env, settings, watch), curve


def _returns(
    config: Config, env: FederationVectorEnv, trained: Trained, policy: Policy
) -> dict[str, dict[str, float]]:
    """Return the mean return of every kind of controller, with 95 % intervals, by its name."""
    returns = {}
    for kind in get_args(ControllerKind):
        if kind == "fixed":  # it is what the settings of a run say, not of what there is to choose
            continue
        count = _NUM_JUDGES if kind != "descent" else _NUM_JUDGES // 10
        judge = env.resized(count)
        planner: Planner = PolicyPlanner(policy)
        if kind != "sabppo":
            planner = planner_of(kind, config, judge.process, trained)
        found = episode_returns(planner, judge, seed=derive_seed(config.seed, "judge"))
        half = 1.96 * float(found.std(ddof=1)) / math.sqrt(count)
        returns[kind] = {"mean": float(found.mean()), "half_width": half}
    return returns
