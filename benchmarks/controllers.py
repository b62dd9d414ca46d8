"""Controllers in the simulated cell: who gets the most, how near to the best, and for how many.

    python benchmarks/controllers.py standard CALIBRATION [--seeds 0 1 2 3 4] [--out FOLDER]
    python benchmarks/controllers.py small CALIBRATION
    python benchmarks/controllers.py sizes CALIBRATION
    python benchmarks/controllers.py table [--out FOLDER]

CALIBRATION is a folder of ``fedpeat calibrate``. Every result is a file of its own in the folder,
and what is there is not measured again. Policies and plans are trained on worlds of their seed, and
all are judged in the same 2000 worlds that none was trained in. Stable-Baselines3's PPO takes part
where it is installed (``pip install --no-deps stable-baselines3==2.9.2``).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from fedpeat.config.loading import load_config, override
from fedpeat.config.schema import Config
from fedpeat.control.descent import CoordinateDescent
from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.optimum import optimal_returns
from fedpeat.control.planners import (
    RULES,
    FixedPlanner,
    Planner,
    RandomPlanner,
    episode_returns,
    tune,
)
from fedpeat.control.policy import Policy
from fedpeat.control.sabppo import PolicyPlanner, SabppoSettings, train_sabppo
from fedpeat.core.run_folder import write_atomically
from fedpeat.experiments.learn import world_of
from fedpeat.mec.quality import QualityModel
from fedpeat.report.intervals import estimate

JUDGE_SEED, NUM_JUDGES = 987_654, 2000
SIZES = (5, 10, 50, 500)
VARIANTS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sabppo set": ({}, {}),
    "sabppo set, joint ratio": ({}, {"ratio": "joint"}),
    "sabppo mlp": ({}, {"network": "mlp"}),
    "sabppo set, chosen bandwidth": ({"controller": {"bandwidth": "branch"}}, {}),
}
"""Changes to the world, and to how the policy is trained, by the variant's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("standard", "small", "sizes", "table"))
    parser.add_argument("calibration", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1_000_000, help="rounds to train on")
    parser.add_argument("--only", nargs="+", help="variants, by the beginnings of their names")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/control/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "table":
        print(table(args.out))
        return
    config = load_config(str(args.calibration / "config.yaml"))
    jobs = {"standard": standard, "small": small, "sizes": sizes}[args.what](config, args)
    for name, job in jobs.items():
        if args.only and not any(name.startswith(f"{args.what} {part}") for part in args.only):
            continue
        path = args.out / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            result = job()
            write_atomically(path, json.dumps(result) + "\n")
            print(name, {k: v for k, v in result.items() if k != "returns"}, flush=True)


Jobs = dict[str, Callable[[], dict[str, Any]]]


# --- the standard world -------------------------------------------------------------------------


def standard(config: Config, args: argparse.Namespace) -> Jobs:
    """Train everything in the world of the calibration, each with every seed."""
    jobs: Jobs = {}
    for seed in args.seeds:
        for name, (changes, training) in VARIANTS.items():
            settings = SabppoSettings(total_steps=args.steps, seed=seed, **training)
            there = partial(world_of, override(config, changes), args.calibration)
            jobs[f"standard {name} {seed}"] = partial(_trained, there, settings)
        there = partial(world_of, config, args.calibration)
        for rule in RULES:
            jobs[f"standard tuned {rule} {seed}"] = partial(_tuned, there, rule, args.steps, seed)
        if importlib.util.find_spec("stable_baselines3"):
            jobs[f"standard sb3 ppo {seed}"] = partial(_rival, there, args.steps, seed)
    jobs["standard random 0"] = partial(_chance, config, args)
    jobs["standard descent 0"] = partial(_descent, config, args)
    return jobs


World = Callable[[], FederationVectorEnv]


def _chance(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    return _judged(RandomPlanner(), world_of(config, args.calibration), 0.0)


def _descent(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    env = world_of(config, args.calibration)
    start = FixedPlanner(tune(env, "random", total_steps=args.steps, seed=0))
    return _judged(CoordinateDescent(start), env, 0.0, count=NUM_JUDGES // 10)


def _trained(there: World, settings: SabppoSettings) -> dict[str, Any]:
    env = there()
    curve: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    policy = train_sabppo(
        env,
        settings,
        lambda p: curve.append((p.num_steps, p.mean_return, time.perf_counter() - start)),
    )
    seconds = time.perf_counter() - start
    return {**_judged(PolicyPlanner(policy), env, seconds), "curve": curve}


def _tuned(there: World, rule: str, total_steps: int, seed: int) -> dict[str, Any]:
    env = there()
    start = time.perf_counter()
    plan = tune(env, rule, total_steps=total_steps, seed=seed)
    seconds = time.perf_counter() - start
    return {**_judged(FixedPlanner(plan), env, seconds), "plan": vars(plan)}


def _rival(there: World, total_steps: int, seed: int) -> dict[str, Any]:
    train = importlib.import_module("sb3_rival").train
    planner, env, seconds, curve = train(there(), total_steps, seed)
    return {**_judged(planner, env, seconds), "curve": curve}


def _judged(
    planner: Planner, env: FederationVectorEnv, seconds: float, count: int = NUM_JUDGES
) -> dict[str, Any]:
    returns = episode_returns(planner, env.resized(count), seed=JUDGE_SEED)
    return {"mean": float(returns.mean()), "seconds": seconds, "returns": returns.tolist()}


# --- small worlds -------------------------------------------------------------------------------


def small(config: Config, args: argparse.Namespace) -> Jobs:
    """Train in worlds so small that the best sequence of choices can be found."""
    return {
        f"small {devices} devices {seed}": partial(_small, config, args, devices, seed)
        for devices in (1, 2, 3)
        for seed in args.seeds
    }


def _small(config: Config, args: argparse.Namespace, num_devices: int, seed: int) -> dict[str, Any]:
    env = _few_choices(config, args.calibration, num_devices)
    settings = SabppoSettings(total_steps=args.steps, seed=seed)
    start = time.perf_counter()
    policy = train_sabppo(env, settings)
    seconds = time.perf_counter() - start
    judge = env.resized(40)
    reached = episode_returns(PolicyPlanner(policy), judge, seed=JUDGE_SEED)
    chance = np.mean(
        [
            episode_returns(RandomPlanner(np.random.default_rng(go)), judge, seed=JUDGE_SEED)
            for go in range(20)
        ],
        axis=0,
    )
    judge.reset(seed=JUDGE_SEED)
    best = optimal_returns(judge.process)
    ratio = float((reached - chance).mean() / (best - chance).mean())
    return {
        "mean": ratio,
        "seconds": seconds,
        "sabppo": float(reached.mean()),
        "random": float(chance.mean()),
        "optimum": float(best.mean()),
    }


def _few_choices(config: Config, calibration: Path, num_devices: int) -> FederationVectorEnv:
    """Return a still world with the outer two rungs, two numbers of steps, and few rounds."""
    world, workload, quality, settings = world_of(config, calibration).parts
    ends = [0, workload.num_rungs - 1]
    few = replace(workload, rungs=[workload.rungs[place] for place in ends])
    mean = quality.mean()
    own = {**vars(mean), "speed": mean.speed[:, ends], "excess": mean.excess[:, ends]}
    coarse = replace(
        settings,
        horizon={1: 5, 2: 3, 3: 2}[num_devices],
        local_steps=(settings.local_steps[1], settings.local_steps[-1]),
        server_steps=(0, settings.server_steps[-1]),
        realigns=False,
    )
    still = replace(world, num_devices=num_devices, still=True)
    return FederationVectorEnv(still, few, QualityModel(**own), coarse, 256)


# --- other numbers of devices -------------------------------------------------------------------


def sizes(config: Config, args: argparse.Namespace) -> Jobs:
    """Judge policies of ten devices with others, against those trained with as many."""
    jobs: Jobs = {}
    for seed in args.seeds:
        for number in SIZES:
            jobs[f"sizes {number} {seed}"] = partial(_sizes, config, args, number, seed)
    return jobs


def _sizes(config: Config, args: argparse.Namespace, number: int, seed: int) -> dict[str, Any]:
    steps = args.steps if number <= 50 else args.steps // 4
    carried = _of_ten(config, args.calibration, args.steps, seed)
    there = _with_devices(config, args.calibration, number)
    own = (
        carried
        if number == 10
        else train_sabppo(there, SabppoSettings(total_steps=steps, seed=seed))
    )
    plan = tune(there, "random", total_steps=steps, seed=seed)
    judge = there.resized(NUM_JUDGES if number <= 50 else 200)
    planners: dict[str, Planner] = {
        "trained with 10": PolicyPlanner(carried),
        "trained there": PolicyPlanner(own),
        "tuned there": FixedPlanner(plan),
    }
    means = {
        name: float(episode_returns(planner, judge, seed=JUDGE_SEED).mean())
        for name, planner in planners.items()
    }
    return {"mean": means["trained with 10"], **means}


@functools.cache
def _of_ten(config: Config, calibration: Path, total_steps: int, seed: int) -> Policy:
    ten = _with_devices(config, calibration, 10)
    return train_sabppo(ten, SabppoSettings(total_steps=total_steps, seed=seed))


def _with_devices(config: Config, calibration: Path, number: int) -> FederationVectorEnv:
    world, workload, quality, settings = world_of(config, calibration).parts
    num_envs = max(16, min(config.controller.num_envs, 2560 // number))
    return FederationVectorEnv(
        replace(world, num_devices=number), workload, quality, settings, num_envs
    )


# --- the tables ---------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """Return all that was measured as Markdown: means over seeds with 95 % t-intervals."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        name, _, _ = path.stem.rpartition(" ")
        found.setdefault(name, []).append(json.loads(path.read_text()))
    lines = ["| What | Seeds | Mean | 95 % interval | Seconds |", "|:--|--:|--:|--:|--:|"]
    for name, results in found.items():
        known = estimate([result["mean"] for result in results])
        assert known is not None
        half = "-" if known.half_width is None else f"± {known.half_width:.4f}"
        seconds = _mean([r["seconds"] for r in results if "seconds" in r])
        lines.append(f"| {name} | {len(results)} | {known.mean:.4f} | {half} | {seconds} |")
        lines += [
            f"| {name}, {other} | | {_mean([r[other] for r in results])} | | |"
            for other in ("trained there", "tuned there")
            if other in results[0]
        ]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4g}" if values else "-"


if __name__ == "__main__":
    main()
