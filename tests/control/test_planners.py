"""Plans without learning, how they are tuned, and what the best there is comes to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeat.control.descent import CoordinateDescent
from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.optimum import optimal_returns
from fedpeat.control.planners import RULES, FixedPlan, FixedPlanner, episode_returns, tune
from fedpeat.control.process import FederationProcess, ProcessSettings
from fedpeat.core.errors import WorldError
from fedpeat.mec.world import WorldSettings
from worlds import quality, workload


def env(num_envs: int = 8, num_devices: int = 10, **changes: Any) -> FederationVectorEnv:
    of_world = {
        name: changes.pop(name) for name in ("preset", "still", "radius_m") if name in changes
    }
    equal: dict[str, Any] = {"bandwidth": "branch", "bandwidth_weights": (1.0,)}
    settings = ProcessSettings(**({"horizon": 4} | equal | changes))
    world = WorldSettings(num_devices=num_devices, **of_world)
    return FederationVectorEnv(world, workload(), quality(), settings, num_envs)


def small(num_devices: int = 2, num_envs: int = 6, **changes: Any) -> FederationVectorEnv:
    """Return worlds with so few choices that all can be tried."""
    few: dict[str, Any] = {"local_steps": (2, 8), "server_steps": (0, 4), "horizon": 2}
    few |= {"realigns": False, "weights": {"seconds": 0.02, "bytes": 0.02}}
    return env(num_envs, num_devices, still=True, preset="laptop", **(few | changes))


def chosen(rule: str, process: FederationProcess, fraction: float = 0.5) -> np.ndarray:
    return FixedPlanner(FixedPlan(rule, fraction)).choose(process).takes_part


@pytest.mark.parametrize("rule", ["random", "round_robin", "channel"])
def test_a_share_of_all_devices_takes_part(rule: str) -> None:
    process = env(num_envs=50).process
    able = process.world.feasible.any(-1)
    for fraction, count in [(0.01, 1), (0.5, 5), (1.0, 10)]:
        takes_part = chosen(rule, process, fraction)
        assert (takes_part.sum(-1) == np.minimum(count, able.sum(-1))).all()
        assert not (takes_part & ~able).any()


def test_devices_are_drawn_anew_every_round() -> None:
    process = env(num_envs=1, preset="laptop").process
    drawn = [tuple(chosen("random", process, 0.3)[0]) for _ in range(20)]
    assert len(set(drawn)) > 5


def test_in_turn_everyone_comes_before_anyone_comes_again() -> None:
    there = env(num_envs=1, still=True, preset="laptop")
    planner = FixedPlanner(FixedPlan("round_robin", 0.25))
    seen = np.zeros(10, dtype=int)
    for _ in range(3):  # two or three of ten at a time: 0.25 of 10 is rounded to even
        choices = planner.choose(there.process)
        seen += choices.takes_part[0]
        there.run_round(choices)
    assert seen.sum() == 6
    assert seen.max() == 1


def test_the_best_channels_are_taken() -> None:
    process = env(num_envs=20, preset="laptop").process
    worse = np.minimum(process.world.snr_down, process.world.snr_up)
    takes_part = chosen("channel", process)
    lowest_in = np.where(takes_part, worse, np.inf).min(-1)
    assert (lowest_in > np.where(takes_part, 0, worse).max(-1)).all()


def test_a_deadline_takes_the_fastest_that_are_done_in_time() -> None:
    process = env(num_envs=40, preset="mixed").process
    everyone = chosen("deadline", process, 1.0)
    assert (everyone == process.world.feasible.any(-1)).all()
    few = chosen("deadline", process, 0.2)
    assert few.any(-1).all()
    assert few.sum() < everyone.sum()
    planner = FixedPlanner(FixedPlan("deadline", 0.2))
    in_time = process.world.price(process.demand(planner.choose(process))).device_s.max(-1)
    slowest = FixedPlanner(FixedPlan("deadline", 1.0))
    whole = process.world.price(process.demand(slowest.choose(process))).device_s.max(-1)
    several = few.sum(-1) > 1  # one is always taken
    assert several.sum() > 5
    assert (in_time <= 0.2 * whole + 1e-9)[several].all()


def test_who_lacks_memory_gets_the_next_rung_that_fits() -> None:
    process = env(num_envs=30, preset="iot").process
    state = process.world._state  # noqa: SLF001
    free = np.full_like(state.free_memory_bytes, 5e8)  # enough for medium, not for large
    process.world._state = type(state)(**{**vars(state), "free_memory_bytes": free})  # noqa: SLF001
    for highest, expected in [(0, 1), (1, 1), (2, 2)]:
        assert (FixedPlanner(FixedPlan(rung=highest)).choose(process).rung == expected).all()


def test_alignment_comes_every_so_many_rounds() -> None:
    there = env(num_envs=1, horizon=9)
    planner, aligned = FixedPlanner(FixedPlan(realign_every=3)), []
    for _ in range(9):
        choices = planner.choose(there.process)
        aligned.append(bool(choices.realigns[0]))
        there.run_round(choices)
    assert [place for place, now in enumerate(aligned) if now] == [3, 6]


def test_each_world_may_follow_a_plan_of_its_own() -> None:
    process = env(num_envs=2, preset="laptop").process
    choices = FixedPlanner(FixedPlan(fraction=0.1), FixedPlan(rung=2, local_steps=3)).choose(
        process
    )
    assert choices.takes_part.sum(-1).tolist() == [1, 10]
    assert choices.rung[:, 0].tolist() == [0, 2]
    assert choices.local_steps[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "luck"}, "rule of a plan must be one of random, .*, got 'luck'"),
        ({"fraction": 0.0}, r"fraction of a plan must be in \(0, 1\], got 0.0"),
        ({"fraction": float("nan")}, r"fraction of a plan must be in \(0, 1\], got nan"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(WorldError, match=message):
        FixedPlan(**changes)


def test_tuning_finds_a_plan_near_the_best_of_all() -> None:
    few: dict[str, Any] = {"local_steps": (2, 8), "server_steps": (0, 4), "realigns": False}
    there = env(num_envs=128, **few)
    found = tune(there, "random", total_steps=4 * 128 * 4 * 4, seed=0)
    judge = env(num_envs=400, **few)

    def worth(plan: FixedPlan) -> float:
        return float(episode_returns(FixedPlanner(plan), judge, seed=99).mean())

    others = [
        FixedPlan("random", fraction, place, steps, own)
        for fraction in (0.1, 0.5, 1.0)
        for place in range(3)
        for steps in range(2)
        for own in range(2)
    ]
    worths = [worth(plan) for plan in others]
    assert worth(found) > max(worths) - 0.1 * (max(worths) - min(worths))


def test_plans_are_not_tuned_with_too_few_rounds() -> None:
    with pytest.raises(WorldError, match="total_steps must be at least .* got 1,000"):
        tune(env(), "random", total_steps=1000, seed=0)


def test_descent_never_chooses_a_worse_round_than_it_began_with() -> None:
    process = env(num_envs=10).process
    start = FixedPlanner(FixedPlan(fraction=1.0, local_steps=3, server_steps=3))
    better = CoordinateDescent(start)

    def worth(choices: Any) -> np.ndarray:
        demand = process.demand(choices)
        cost = process.world.price(demand)
        return process.rewards(cost, process.loss_after(demand, cost.finished))

    assert (worth(better.choose(process)) > worth(start.choose(process))).all()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_one_round_ahead_the_best_of_all_choices_is_the_optimum(num_devices: int) -> None:
    there = small(num_devices, horizon=1)
    best = optimal_returns(there.process)
    descent = episode_returns(CoordinateDescent(FixedPlanner(FixedPlan())), there, seed=0)
    there.reset(seed=0)
    assert (descent <= best + 1e-9).all()
    assert descent.mean() > 0.95 * best.mean()


def test_no_sequence_of_choices_beats_the_optimum_and_one_reaches_it() -> None:
    there = small(num_devices=1, num_envs=1)
    best = optimal_returns(there.process)[0]
    num_choices = np.array(there.single_action_space.nvec)  # type: ignore[attr-defined]
    every = np.stack(np.meshgrid(*map(np.arange, num_choices), indexing="ij"), -1)
    actions = every.reshape(-1, len(num_choices))
    returns = []
    for first in actions:
        for second in actions:
            there.reset(seed=0)
            rewards = [float(there.step(action[None])[1][0]) for action in (first, second)]
            returns.append(sum(rewards))
    assert max(returns) == pytest.approx(best)
    assert np.std(returns) > 0.01


def test_the_optimum_leaves_the_process_as_it_is() -> None:
    process = small().process
    before = process.observe()
    optimal_returns(process)
    after = process.observe()
    assert all((before[name] == after[name]).all() for name in before)


def test_an_optimum_is_not_sought_where_chance_plays() -> None:
    with pytest.raises(WorldError, match="in a world that is still"):
        optimal_returns(env().process)


def test_a_still_world_gives_the_same_returns_whatever_is_drawn() -> None:
    there = small()
    planner = FixedPlanner(FixedPlan(local_steps=1))
    returns = episode_returns(planner, there, seed=0)
    there.reset(seed=0)
    there.process.rng.random(99)
    again = np.zeros(there.num_envs)
    for _ in range(2):
        again += there.run_round(planner.choose(there.process))[1]
    assert (returns == again).all()


def test_what_follows_a_spent_budget_is_of_the_next_episode() -> None:
    planner = FixedPlanner(FixedPlan(fraction=0.3, local_steps=1))
    there = env(num_envs=16, budgets={"bytes": 3e7})
    there.reset(seed=0)
    running, expected, counts = np.ones(16, dtype=bool), np.zeros(16), np.zeros(16)
    for _ in range(4):
        _, rewards, ended, _, _ = there.run_round(planner.choose(there.process))
        expected += np.where(running, rewards, 0)
        counts += running
        running &= ~ended
    assert len(set(counts.tolist())) > 1
    np.testing.assert_array_equal(episode_returns(planner, there, seed=0), expected)


def test_every_rule_is_a_rival() -> None:
    there = env(num_envs=64)
    for rule in RULES:
        assert np.isfinite(episode_returns(FixedPlanner(FixedPlan(rule)), there, seed=0)).all()
