"""The controlled process as Gymnasium environments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from fedpeat.control.federation_env import FederationEnv, FederationVectorEnv
from fedpeat.control.process import ProcessSettings
from fedpeat.core.errors import WorldError
from fedpeat.mec.quality import QualityModel, RoundWork
from fedpeat.mec.world import WorldSettings
from worlds import quality, workload

FREE: dict[str, Any] = {"weights": {}}
DEVICES = 10


def many(
    num_envs: int = 8, seed: int = 0, preset: str = "mixed", **changes: Any
) -> FederationVectorEnv:
    world = WorldSettings(preset=preset, num_devices=DEVICES)
    settings = ProcessSettings(**changes)
    return FederationVectorEnv(world, workload(), quality(), settings, num_envs, seed)


def action(env: FederationVectorEnv, **choices: int) -> np.ndarray:
    """Ask every device and the server for the same, 0 where nothing is said."""
    device = [choices.get(name, 0) for name in env.branches.device] * DEVICES
    server = [choices.get(name, 0) for name in env.branches.server]
    return np.tile([*device, *server], (env.num_envs, 1))


@pytest.mark.parametrize("bandwidth", ["optimal", "branch"])
def test_gymnasium_finds_nothing_wrong(bandwidth: Any) -> None:
    settings = ProcessSettings(bandwidth=bandwidth, horizon=5)
    env = FederationEnv(WorldSettings(), workload(), quality(), settings)
    check_env(env, skip_render_check=True)


def test_an_environment_alone_is_one_world_of_many() -> None:
    settings = ProcessSettings(horizon=4)
    one = FederationEnv(WorldSettings(), workload(), quality(), settings)
    batch = FederationVectorEnv(WorldSettings(), workload(), quality(), settings, 1)
    first, _ = one.reset(seed=7)
    firsts, _ = batch.reset(seed=7)
    assert all((first[name] == firsts[name][0]).all() for name in first)
    batch.action_space.seed(0)
    for _ in range(4):
        actions = batch.action_space.sample()
        obs, reward, terminated, truncated, info = one.step(actions[0])
        several = batch.step(actions)
        last = several[4].get("final_obs", several[0])
        assert all((obs[name] == last[name][0]).all() for name in obs)
        assert [reward, terminated, truncated] == [float(part[0]) for part in several[1:4]]
        assert info["loss"] == several[4]["loss"]
    assert terminated
    assert not truncated


def test_the_return_is_the_share_of_the_way_to_the_floor() -> None:
    env = many(horizon=3, preset="laptop", **FREE)
    env.reset(seed=0)
    total = np.zeros(env.num_envs)
    for _ in range(3):
        _, rewards, _, _, info = env.step(action(env, takes_part=1, rung=2, local_steps=1))
        total += rewards
    gone = (3.0 - info["loss"]) / (3.0 - 2.0)
    np.testing.assert_allclose(total, gone)
    assert (gone > 0.1).all()


def test_the_reference_plan_costs_the_weights() -> None:
    names = ("seconds", "joules", "bytes")
    for chosen in names:
        env = many(
            200,
            horizon=10,
            bandwidth="branch",
            weights={chosen: 0.5},
            start_loss=3.0,
        )
        costs, before = np.zeros(200), np.full(200, 3.0)
        for _ in range(10):
            _, rewards, _, _, info = env.step(
                action(env, takes_part=1, rung=2, local_steps=2, bandwidth=0)
            )
            costs += (before - info["loss"]) / 1.0 - rewards
            before = info["loss"]
        emulators = 10 * 3e6 / (10 * 10 * 190_000) if chosen == "bytes" else 0
        assert costs.mean() == pytest.approx(0.5 * (1 + emulators), rel=0.25)


def test_a_policy_sees_whose_data_were_used_of_late() -> None:
    env = many(4, preset="laptop", horizon=9, **FREE)
    obs, _ = env.reset(seed=0)
    place = env.process.features["devices"].index("recent_share")
    assert (obs["devices"][..., place] == 0).all()
    first_alone = action(env, takes_part=0, rung=2, local_steps=1)
    first_alone[:, 0] = 1
    for _ in range(3):
        obs, *_ = env.step(first_alone)
        np.testing.assert_allclose(obs["devices"][..., place], [[1.0] + [0.0] * 9] * 4)
    examples = env.process.episode.examples
    obs, *_ = env.step(action(env, takes_part=1, rung=2, local_steps=1))
    examples = examples * (env.process.episode.idle_rounds == 0)  # those whose update came back
    shares = examples / examples.sum(-1, keepdims=True)
    recent = shares + 0.7 * (1 + 0.7 + 0.49) * (np.arange(DEVICES) == 0)
    wanted = recent / recent.sum(-1, keepdims=True)
    np.testing.assert_allclose(obs["devices"][..., place], wanted, rtol=1e-5)


def test_the_mask_is_what_the_devices_can_hold() -> None:
    env = many(50)
    obs, _ = env.reset(seed=1)
    for _ in range(3):
        obs, *_ = env.step(action(env, takes_part=1, rung=2))
    feasible = env.process.world.feasible
    width = sum(env.branches.device.values())
    masks = obs["mask"][:, : DEVICES * width].reshape(50, DEVICES, width)
    able = feasible.any(-1)
    assert (~able).any()
    assert (masks[..., 0] == 1).all()
    assert (masks[..., 1] == able).all()
    assert (masks[able][:, 2:5] == feasible[able]).all()
    assert (masks[~able][:, 2:5] == 1).all()
    assert (masks[..., 5:] == 1).all()
    assert (obs["mask"][:, DEVICES * width :] == 1).all()
    assert obs["mask"].shape[1] == env.branches.sizes.sum()


def test_a_device_asked_for_what_it_cannot_hold_sits_out() -> None:
    env = many(20, preset="iot")
    env.reset(seed=0)
    able = env.process.world.feasible[..., 0]
    assert (~able).any()
    _, _, _, _, info = env.step(action(env, takes_part=1, rung=0))
    expected = able.sum(-1) * (6_000_000 + 300_000 + 270_000)
    np.testing.assert_array_equal(info["bytes"], expected)


def test_an_action_is_read_branch_by_branch() -> None:
    env = many(1, bandwidth="branch")
    flat = action(env)
    flat[0, :8] = [1, 2, 3, 1, 0, 1, 2, 3]
    flat[0, -2:] = [2, 1]
    choices = env.process.read(flat)
    assert choices.takes_part[0, :2].tolist() == [True, False]
    assert choices.rung[0, :2].tolist() == [2, 1]
    assert choices.local_steps[0, :2].tolist() == [3, 2]
    assert choices.bandwidth is not None
    assert choices.bandwidth[0, :2].tolist() == [1, 3]
    assert (choices.server_steps.tolist(), choices.realigns.tolist()) == ([2], [True])


def test_shares_of_the_band_go_by_the_weights_and_none_beat_the_optimal_ones() -> None:
    seconds = {}
    for case, first, others in (("all 1", 0, 0), ("all 8", 3, 3), ("first 8", 3, 0)):
        env = many(50, preset="laptop", bandwidth="branch")
        env.reset(seed=3)
        actions = action(env, takes_part=1, rung=2, bandwidth=others)
        actions[:, 3] = first
        seconds[case] = env.step(actions)[4]["seconds"]
    np.testing.assert_allclose(seconds["all 1"], seconds["all 8"])
    assert (seconds["first 8"] != seconds["all 1"]).all()
    env = many(50, preset="laptop")
    env.reset(seed=3)
    optimal = env.step(action(env, takes_part=1, rung=2))[4]["seconds"]
    assert (optimal <= np.minimum(seconds["all 1"], seconds["first 8"]) * (1 + 1e-4)).all()


def test_an_episode_ends_with_the_horizon_and_the_next_one_begins() -> None:
    env = many(4, horizon=2)
    env.reset(seed=0)
    env.step(action(env, server_steps=3))
    obs, _, terminated, truncated, info = env.step(action(env, server_steps=3))
    assert terminated.all()
    assert not truncated.any()
    assert info["_final_obs"].all()
    assert (info["final_obs"]["world"][:, 0] == 1).all()
    assert (obs["world"][:, 0] == 0).all()
    assert (info["final_obs"]["world"][:, 1] > 0).all()
    assert (obs["world"][:, 1] == 0).all()


def test_a_round_is_told_to_the_quality_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[RoundWork] = []
    next_loss = QualityModel.next_loss

    def watched(self: QualityModel, loss: Any, work: RoundWork, member: Any) -> Any:
        told.append(work)
        return next_loss(self, loss, work, member)

    monkeypatch.setattr(QualityModel, "next_loss", watched)
    env = many(40, preset="phone")
    obs, _ = env.reset(seed=0)
    actions = action(env, takes_part=1, rung=2, local_steps=1)
    actions[:, :3] = [1, 1, 3]  # the first device alone on the medium rung, with 16 steps for 4
    actions[:20, -2] = 2  # eight steps of the server in half of the worlds
    examples = np.exp(obs["devices"][..., 5].astype(float)) * (200 * 2000) ** 0.5
    obs, _, _, _, info = env.step(actions)
    finished = obs["devices"][..., 6] == 0
    assert 0 < finished[:, 0].sum() < 40
    np.testing.assert_array_equal(finished.sum(-1), info["num_finished"])
    (work,) = told
    n = examples * finished
    share = n[:, 0] / n.sum(-1)
    expected = np.stack([0 * share, share, 1 - share], axis=-1)
    np.testing.assert_allclose(work.rung_share, expected, atol=1e-5)
    np.testing.assert_allclose(work.local_steps, 16 * share + 4 * (1 - share), rtol=1e-5)
    np.testing.assert_allclose(work.num_effective, n.sum(-1) ** 2 / (n**2).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(work.server_steps, [8] * 20 + [0] * 20)
    own = np.where(np.arange(40) < 20, 1000, 0)
    np.testing.assert_allclose(work.server_share, own / (own + n.sum(-1)), rtol=1e-5)


def test_who_took_part_long_ago_is_told_by_how_the_loss_went_on() -> None:
    env = many(30, preset="phone", **FREE)
    env.reset(seed=0)
    obs, _, _, _, info = env.step(action(env, takes_part=1, rung=2))
    took_part, first = obs["devices"][..., 6] == 0, info["loss"]
    np.testing.assert_allclose(obs["devices"][..., 7], np.repeat(3.0 - first[:, None], 10, 1), 1e-4)
    obs, _, _, _, info = env.step(action(env, server_steps=3))
    np.testing.assert_allclose(obs["devices"][..., 6], np.where(took_part, 0.1, 0.2), rtol=1e-5)
    np.testing.assert_allclose(obs["devices"][..., 7], 3.0 - info["loss"][:, None] + 0 * took_part)
    obs, _, _, _, info = env.step(action(env, takes_part=1, rung=2))
    again = obs["devices"][..., 6] == 0
    assert again.any()
    assert (obs["devices"][..., 7][again] < obs["devices"][..., 7][~again].max()).all()


def test_each_episode_follows_a_member_of_the_ensemble() -> None:
    one = vars(quality())
    two = QualityModel(**{name: np.concatenate([value, value]) for name, value in one.items()})
    two.floor[1] = 2.5
    env = FederationVectorEnv(WorldSettings(), workload(), two, ProcessSettings(), 200)
    _, _, _, _, info = env.step(action(env, server_steps=3))
    low, high = np.unique(info["loss"].round(9))
    assert low < high
    assert 0.3 < (info["loss"] < (low + high) / 2).mean() < 0.7


def test_a_budget_ends_an_episode() -> None:
    env = many(50, budgets={"bytes": 4e7}, horizon=30)
    env.reset(seed=0)
    spent, ended = np.zeros(50), np.zeros(50, dtype=bool)
    for _ in range(6):
        _, _, terminated, truncated, info = env.step(action(env, takes_part=1, rung=2))
        spent = np.where(ended, spent, spent + info["bytes"])
        assert (terminated[~ended] == (spent >= 4e7)[~ended]).all()
        assert not truncated.any()
        ended |= terminated
    assert ended.any()
    assert not ended.all()


def test_alignment_makes_emulators_fresh_again() -> None:
    env = many(1, preset="laptop", **FREE)
    env.reset(seed=0)
    for _ in range(5):
        obs, *_ = env.step(action(env))
    assert obs["world"][0, 2] == np.float32(5 / 20)
    obs, *_ = env.step(action(env, realigns=1))
    assert obs["world"][0, 2] == np.float32(1 / 20)


def test_the_same_seed_gives_the_same_episodes() -> None:
    outcomes = []
    for seed in (0, 0, 1):
        env = many(3, horizon=3, seed=9)
        env.reset(seed=seed)
        env.action_space.seed(4)
        outcomes.append([env.step(env.action_space.sample())[4]["loss"] for _ in range(7)])
    assert np.array_equal(outcomes[0], outcomes[1])
    assert not np.array_equal(outcomes[0], outcomes[2])


def test_every_feature_has_a_name() -> None:
    env = many(2)
    obs, _ = env.reset(seed=0)
    assert {name: obs[name].shape[-1] for name in ("devices", "world")} == {
        name: len(names) for name, names in env.process.features.items()
    }
    held = [i for i, name in enumerate(env.process.features["devices"]) if name == "holds nothing"]
    assert (obs["devices"][..., held] == 1).all()


def test_observations_are_of_order_one() -> None:
    env = many(300)
    env.action_space.seed(0)
    for _ in range(10):
        obs, *_ = env.step(env.action_space.sample())
    for name in ("devices", "world"):
        assert np.isfinite(obs[name]).all()
        assert np.abs(obs[name]).mean() < 2
    assert np.percentile(np.abs(obs["devices"]), 99) < 5


def test_a_quality_model_of_another_ladder_is_refused() -> None:
    two = type(workload())(workload().rungs[:2])
    with pytest.raises(WorldError, match="must know the workload's 2 rungs, got 3"):
        FederationVectorEnv(WorldSettings(), two, quality(), ProcessSettings(), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon of an episode must be at least 1, got 0"),
        ({"local_steps": ()}, "local_steps of an episode must be finite and 1 or more, got "),
        ({"local_steps": (0, 2)}, "local_steps of an episode must be finite and 1 or more"),
        ({"server_steps": (-1,)}, "server_steps of an episode must be finite and 0 or more"),
        ({"bandwidth_weights": (0.0,)}, "bandwidth_weights of an episode must be finite and 1e-06"),
        ({"device_examples": (9.0, 3.0)}, "device_examples of an episode must rise, got"),
        ({"start_loss": math.nan}, "start_loss of an episode must be finite"),
        ({"weights": {"watts": 1.0}}, "weights of an episode must be of seconds, joules, bytes"),
        ({"budgets": {"bytes": -1.0}}, "budgets of an episode must be of seconds, joules, bytes"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        ProcessSettings(**changes)
