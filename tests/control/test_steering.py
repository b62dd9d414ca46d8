"""A planner steers a real federation in a simulated world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.planners import FixedPlan, FixedPlanner, RandomPlanner
from fedpeat.control.policy import make_policy
from fedpeat.control.process import FederationProcess, ProcessSettings
from fedpeat.control.steering import SteeringController
from fedpeat.control.trained import Trained, load_trained, save_trained
from fedpeat.core.errors import CheckpointError, WorldError
from fedpeat.core.records import ClientState, Controller, RoundObservation, RoundPlan
from fedpeat.mec.world import WorldSettings
from worlds import quality, workload

NAMES = ["a", "b", "c", "d", "e"]
RUNGS = ["large", "medium", "small"]


def process(num_devices: int = 5, seed: int = 0, **changes: Any) -> FederationProcess:
    of_world = {"preset": "laptop", **changes}
    world = WorldSettings(num_devices=num_devices, **of_world)
    return FederationProcess(world, workload(), quality(), ProcessSettings(), 1, seed)


def controller(seed: int = 0, plan: FixedPlan | None = None, **changes: Any) -> SteeringController:
    planner = RandomPlanner() if plan is None else FixedPlanner(plan)
    return SteeringController(process(seed=seed, **changes), planner, NAMES)


def seen(server_round: int, loss: float | None = 2.5, names: list[str] = NAMES) -> RoundObservation:
    clients = tuple(ClientState(name, 100 + place) for place, name in enumerate(names))
    return RoundObservation(server_round, 10, clients, loss)


def test_it_is_a_controller() -> None:
    assert isinstance(controller(), Controller)


def test_a_plan_says_who_does_what_and_what_the_round_costs() -> None:
    steers = controller(plan=FixedPlan(fraction=0.6, rung=1, local_steps=2, server_steps=3))
    there = steers.process
    plan = steers.plan(seen(1))
    assert len(plan.cohort) == 3
    assert {client.rung for client in plan.cohort} == {"medium"}
    assert {client.local_steps for client in plan.cohort} == {there.settings.local_steps[2]}
    assert plan.server_steps == there.settings.server_steps[3]
    assert list(plan.simulated) == ["seconds", "joules", "bytes"]
    asked = workload().rungs[1]
    moved = sum(asked.parts.values()) + asked.adapter_down_bytes + asked.adapter_up_bytes
    assert plan.simulated["bytes"] == 3 * moved
    names = [NAMES[place] for place in np.flatnonzero(there.world.held[0] == 1)]
    assert [client.client_id for client in plan.cohort] == names


def test_what_a_device_holds_is_not_sent_again() -> None:
    steers = controller(plan=FixedPlan())
    first, second = (steers.plan(seen(number)).simulated["bytes"] for number in (1, 2))
    assert second < 0.1 * first


def test_the_simulated_world_loses_updates() -> None:
    steers = controller(plan=FixedPlan(), preset="vehicular")
    lost = [client.lost for number in range(1, 20) for client in steers.plan(seen(number)).cohort]
    assert 0 < sum(map(bool, lost)) < 0.3 * len(lost)
    assert {reason for reason in lost if reason} == {
        "lost on the way, as the simulated world has it"
    }


def test_who_cannot_be_reached_is_not_asked() -> None:
    steers = controller(plan=FixedPlan())
    plan = steers.plan(seen(1, names=["b", "d"]))
    assert [client.client_id for client in plan.cohort] == ["b", "d"]


def test_it_sees_the_real_loss_and_examples() -> None:
    steers = controller(plan=FixedPlan(fraction=0.2))
    steers.plan(seen(1, loss=2.9))
    steers.plan(seen(2, loss=2.4))
    episode = steers.process.episode
    assert episode.loss.tolist() == [2.4]
    assert episode.examples.tolist() == [[100.0, 101.0, 102.0, 103.0, 104.0]]
    assert set(episode.last_loss[0].tolist()) == {2.9, 2.4}
    steers.plan(seen(3, loss=None))  # not measured after every round
    assert steers.process.episode.loss.tolist() == [2.4]


def test_from_its_state_it_goes_on_as_if_nothing_had_been() -> None:
    steers, other = controller(seed=1, preset="mixed"), controller(seed=2, preset="mixed")
    for number in range(1, 4):
        steers.plan(seen(number))
    other.load_state(json.loads(json.dumps(steers.state())))
    for name, value in steers.process.observe().items():
        assert (other.process.observe()[name] == value).all()
    for number in range(4, 9):
        expected: RoundPlan = steers.plan(seen(number))
        assert other.plan(seen(number)) == expected


@pytest.mark.parametrize("change", ["shape", "missing", "text", "rng"])
def test_a_damaged_state_is_refused(change: str) -> None:
    state = json.loads(json.dumps(controller().state()))
    if change == "shape":
        state["arrays"]["held"]["shape"] = [1, 4]
        state["arrays"]["held"]["hex"] = "00" * 32
    elif change == "missing":
        del state["arrays"]["held"]
    elif change == "text":
        state["arrays"]["held"]["hex"] = "hello"
    else:
        state["rng"] = {}
    with pytest.raises(CheckpointError, match="the state of the simulated world is"):
        controller().load_state(state)


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(WorldError, match="to steer 5 devices .* got 1 with 4"):
        SteeringController(process(4), RandomPlanner(), NAMES)


# --- what was learnt ----------------------------------------------------------------------------


def saved(folder: Path) -> Trained:
    env = FederationVectorEnv(
        WorldSettings(num_devices=5), workload(), quality(), ProcessSettings(horizon=7), 2
    )
    plans = {"random": FixedPlan(fraction=0.3), "channel": FixedPlan("channel", rung=2)}
    trained = Trained(env.process.settings, env.process.quality, plans)
    save_trained(folder, trained, make_policy("set", env.process), env.process, {"seed": 3})
    return trained


def test_what_was_learnt_is_read_as_it_was_written(tmp_path: Path) -> None:
    expected = saved(tmp_path / "controller")
    found = load_trained(tmp_path / "controller", RUNGS)
    assert found.settings == expected.settings
    assert found.plans == expected.plans
    for name, value in vars(expected.quality).items():
        assert (getattr(found.quality, name) == value).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 9', "must have schema 1, got 9"),
        ('"large"', '"huge"', r"must be for rungs \['large', .*, got \['huge'"),
        ('"horizon": 7', '"horizon": 0', "is damaged: .*horizon of an episode"),
        ('"fraction": 0.3', '"fraction": 3', "is damaged: .*fraction of a plan"),
        ('"plans"', '"plants"', "is damaged: KeyError"),
        ("{", "", "cannot read controller"),
    ],
)
def test_what_is_damaged_or_for_others_is_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "controller")
    path = tmp_path / "controller" / "controller.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        load_trained(tmp_path / "controller", RUNGS)


def test_a_missing_controller_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read controller .*controller.json"):
        load_trained(tmp_path, RUNGS)
