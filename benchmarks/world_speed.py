"""Speed of the simulated edge: how many rounds of a federation of 10 devices pass in a second.

Worlds with shares of the band given and with optimal ones, the environment in which a policy
learns, and Stable-Baselines3's PPO collecting in it, where that is installed. Everything runs on
one core, but for the line that says two. A machine that does other work besides slows the rounds
per second, hardly those per second of processor time.

    python benchmarks/world_speed.py [--seconds S] [--worlds N]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple, cast

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from gymnasium.spaces import MultiDiscrete
from gymnasium.wrappers import FlattenObservation

from fedpeat.control.federation_env import FederationEnv, FederationVectorEnv
from fedpeat.control.process import ProcessSettings
from fedpeat.mec.quality import QualityModel
from fedpeat.mec.workload import RungLoad, WorkloadProfile
from fedpeat.mec.world import Demand, EdgeWorld, WorldSettings

NUM_DEVICES = 10
NUM_SINGLE = 8  # environments that are stepped one by one
NUM_ACTIONS = 16  # drawn before the clock starts
NUM_STEPS = 32  # of a rollout of PPO

# A language model of 1e9 parameters: 16 blocks of 5e7, embeddings of 2e8. Outer blocks, two below
# and two above, are kept by every rung; of the 12 in the middle a rung keeps 12, 9, 6 or 3.
BLOCK_PARAMETERS, EMBEDDING_PARAMETERS, WIDTH = 5e7, 2e8, 2048
NUM_OUTER, KEPT = 4, (12, 9, 6, 3)
BYTES_PER_PARAMETER = 0.5  # frozen weights in 4 bits
TOKENS = 4 * 256  # a local batch: 4 sequences of 256
ADAPTER_PARAMETERS = NUM_OUTER * 4 * 2 * 8 * WIDTH  # LoRA, r = 8, on 4 square matrices a block
ACTIVATION_BYTES = 34 * TOKENS * WIDTH  # of a block in 16 bits: Korthikanti et al. (2022)


class Speed(NamedTuple):
    """Rounds of one federation in a second, by the clock and by the processor's time."""

    per_s: float
    per_cpu_s: float


def main() -> None:
    """Measure everything in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line (default: 5)")
    parser.add_argument("--worlds", type=int, default=1024, help="side by side (default: 1024)")
    args = parser.parse_args()
    many, few = str(args.worlds), str(NUM_SINGLE)
    lines: list[tuple[str, str, Speed]] = [
        (
            "world, equal shares, one core",
            many,
            measured(world_rounds(args.worlds), args.worlds, args.seconds),
        ),
        ("world, equal shares, two cores", f"2 x {many}", on_two_cores(args.worlds, args.seconds)),
        (
            "world, optimal shares, one core",
            many,
            measured(world_rounds(args.worlds, is_optimal=True), args.worlds, args.seconds),
        ),
        (
            "FederationVectorEnv.step, one core",
            many,
            measured(environment_rounds(args.worlds), args.worlds, args.seconds),
        ),
        ("a loop over FederationEnv, one core", few, measured(loop(), NUM_SINGLE, args.seconds)),
    ]
    collecting = ppo(args.seconds)
    if collecting is not None:
        lines.append(("SB3's PPO collecting on DummyVecEnv, one core", few, collecting))
    print(f"| rounds of {NUM_DEVICES} devices | worlds | rounds/s | rounds/s of processor time |")
    print("|---|---:|---:|---:|")
    for name, worlds, speed in lines:
        print(f"| {name} | {worlds} | {speed.per_s:,.0f} | {speed.per_cpu_s:,.0f} |")
    if collecting is None:
        print("\nStable-Baselines3 is not installed: no PPO.")


def workload() -> WorkloadProfile:
    """Return what tuning the language model asks of devices."""

    def rung(kept: int) -> RungLoad:
        parameters = EMBEDDING_PARAMETERS + (NUM_OUTER + kept) * BLOCK_PARAMETERS
        outer = EMBEDDING_PARAMETERS + NUM_OUTER * BLOCK_PARAMETERS
        middle = {
            f"block-{i}": int(BLOCK_PARAMETERS * BYTES_PER_PARAMETER) for i in range(kept)
        }  # what a smaller rung keeps, a larger one keeps too
        return RungLoad(
            name=f"keep-{kept}",
            parts={"outer": int(outer * BYTES_PER_PARAMETER), **middle},
            adapter_down_bytes=2 * ADAPTER_PARAMETERS,
            adapter_up_bytes=2 * ADAPTER_PARAMETERS,
            step_flops=6 * parameters * TOKENS,
            memory_bytes=parameters * BYTES_PER_PARAMETER
            + 16 * ADAPTER_PARAMETERS  # weights, gradients and Adam's two moments in 32 bits
            + (NUM_OUTER + kept) * ACTIVATION_BYTES,
        )

    rungs = [rung(kept) for kept in KEPT]
    return WorkloadProfile(rungs, server_step_flops=rungs[0].step_flops, realign_flops=1e15)


def quality() -> QualityModel:
    """Return one curve, in which smaller rungs are slower and settle higher."""
    return QualityModel(
        speed=np.array([[0.05, 0.045, 0.04, 0.03]]),
        excess=np.array([[0.0, 0.01, 0.03, 0.1]]),
        skew=np.array([0.05]),
        server_speed=np.array([0.04]),
        steps_power=np.array([0.5]),
        devices_power=np.array([0.5]),
        staleness_decay=np.array([0.02]),
        floor=np.array([2.0]),
    )


def world_rounds(
    num_worlds: int, seed: int = 0, *, is_optimal: bool = False
) -> Callable[[], object]:
    """Return what lets a round pass in which all who can tune on the smallest rung."""
    settings = WorldSettings(num_devices=NUM_DEVICES)
    world = EdgeWorld(settings, workload(), num_worlds, np.random.default_rng(seed))
    shape = (num_worlds, NUM_DEVICES)
    rung, local_steps = np.full(shape, len(KEPT) - 1), np.full(shape, 4)
    server_steps, realigns = np.zeros(num_worlds, dtype=int), np.zeros(num_worlds, dtype=bool)

    def run_round() -> object:
        able = world.feasible[..., -1]
        share = None if is_optimal else able / np.maximum(able.sum(-1, keepdims=True), 1)
        return world.run_round(Demand(able, rung, local_steps, share, server_steps, realigns))

    return run_round


def environment_rounds(num_worlds: int) -> Callable[[], object]:
    """Return what steps the environments side by side, by actions drawn before."""
    env = FederationVectorEnv(*parts(), num_envs=num_worlds)
    env.reset(seed=0)
    draws = np.random.default_rng(0).random((NUM_ACTIONS, num_worlds, len(env.branches.sizes)))
    actions = iter_over((draws * env.branches.sizes).astype(np.int64))
    return lambda: env.step(next(actions))


def loop() -> Callable[[], object]:
    """Return what steps environments one by one and stacks what is seen, as DummyVecEnv does."""
    envs = [single(seed) for seed in range(NUM_SINGLE)]
    sizes = cast("MultiDiscrete", envs[0].action_space).nvec
    draws = np.random.default_rng(0).random((NUM_ACTIONS, NUM_SINGLE, len(sizes)))
    actions = iter_over((draws * sizes).astype(np.int64))

    def step() -> object:
        seen = []
        for env, action in zip(envs, next(actions), strict=True):
            observation, _, terminated, truncated, _ = env.step(action)
            seen.append(env.reset()[0] if terminated or truncated else observation)
        return np.stack(seen)

    return step


def single(seed: int) -> FlattenObservation[Any, Any, Any]:
    """Return one environment with a flat observation."""
    env = FlattenObservation(FederationEnv(*parts()))
    env.reset(seed=seed)
    return env


def parts() -> tuple[WorldSettings, WorkloadProfile, QualityModel, ProcessSettings]:
    """Return what an environment is made of."""
    return WorldSettings(num_devices=NUM_DEVICES), workload(), quality(), ProcessSettings()


def iter_over(actions: np.ndarray) -> Any:
    """Yield the actions over and over."""
    while True:
        yield from actions


def measured(run_round: Callable[[], object], num_worlds: int, seconds: float) -> Speed:
    """Let rounds pass for some time and return how fast they did."""
    for _ in range(3):  # the first rounds send the emulators and touch the memory
        run_round()
    return clocked(run_round, num_worlds, seconds)


def clocked(run_round: Callable[[], object], num_worlds: int, seconds: float) -> Speed:
    """The same without rounds to warm up."""
    clock, processor, count = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - clock) < seconds:
        run_round()
        count += num_worlds
    return Speed(count / passed, count / (time.process_time() - processor))


def on_two_cores(num_worlds: int, seconds: float) -> Speed:
    """Return the sum of two processes that start the clock together."""
    context = get_context("spawn")
    barrier = context.Barrier(2)
    with ProcessPoolExecutor(2, context, initializer=_meet_at, initargs=(barrier,)) as pool:
        each = list(pool.map(_one_of_two, (num_worlds,) * 2, (seconds,) * 2, range(2)))
    return Speed(sum(speed.per_s for speed in each), sum(speed.per_cpu_s for speed in each) / 2)


_barriers: list[Barrier] = []  # that of a process of the pool


def _meet_at(barrier: Barrier) -> None:
    _barriers.append(barrier)


def _one_of_two(num_worlds: int, seconds: float, seed: int) -> Speed:
    run_round = world_rounds(num_worlds, seed)
    for _ in range(3):
        run_round()
    _barriers[0].wait()
    return clocked(run_round, num_worlds, seconds)


def ppo(seconds: float) -> Speed | None:
    """Return how fast PPO collects, its learning not counted; None without Stable-Baselines3."""
    if importlib.util.find_spec("stable_baselines3") is None:
        return None
    sb3 = importlib.import_module("stable_baselines3")
    callbacks = importlib.import_module("stable_baselines3.common.callbacks")
    vectors = importlib.import_module("stable_baselines3.common.vec_env")
    spent = np.zeros(2)
    began = np.zeros(2)

    class Collecting(callbacks.BaseCallback):  # type: ignore[name-defined, misc]
        """Counts the time between the start and the end of each rollout."""

        def _on_rollout_start(self) -> None:
            began[:] = time.perf_counter(), time.process_time()

        def _on_rollout_end(self) -> None:
            spent[:] += np.array([time.perf_counter(), time.process_time()]) - began

        def _on_step(self) -> bool:
            return bool(spent[0] < seconds)

    vector = vectors.DummyVecEnv([lambda seed=seed: single(seed) for seed in range(NUM_SINGLE)])
    model = sb3.PPO("MlpPolicy", vector, n_steps=NUM_STEPS, n_epochs=1, device="cpu")
    model.learn(total_timesteps=10**12, callback=Collecting())
    whole = NUM_STEPS * NUM_SINGLE  # the last rollout stops at its first step
    return Speed(*(model.num_timesteps // whole * whole / spent))


if __name__ == "__main__":
    main()
