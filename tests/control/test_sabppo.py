"""SABPPO: its networks, its loss and its advantages by hand, and that it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeat.control.federation_env import FederationVectorEnv
from fedpeat.control.planners import episode_returns
from fedpeat.control.policy import (
    MlpPolicy,
    NetworkKind,
    Policy,
    SetPolicy,
    choose,
    load_policy,
    make_policy,
    save_policy,
)
from fedpeat.control.process import FederationProcess, ProcessSettings
from fedpeat.control.sabppo import (
    PolicyPlanner,
    Progress,
    SabppoSettings,
    _advantages,
    _clipped_loss,
    _entropy,
    _relevant,
    _Scale,
    train_sabppo,
)
from fedpeat.core.errors import CheckpointError, ConfigError
from fedpeat.mec.world import WorldSettings
from worlds import quality, workload

SHORT = SabppoSettings(total_steps=512, num_steps=8, num_minibatches=2, update_epochs=2)


def env(num_envs: int = 16, num_devices: int = 3, **changes: Any) -> FederationVectorEnv:
    world = WorldSettings(num_devices=num_devices)
    settings = ProcessSettings(**({"horizon": 8} | changes))
    return FederationVectorEnv(world, workload(), quality(), settings, num_envs)


def seen(there: FederationVectorEnv, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    obs, _ = there.reset(seed=seed)
    devices, world = torch.from_numpy(obs["devices"]), torch.from_numpy(obs["world"])
    return devices, world, torch.from_numpy(obs["mask"]).bool()


def policy(kind: NetworkKind, there: FederationVectorEnv) -> Policy:
    """Return a policy with preferences, unlike a fresh one."""
    made = make_policy(kind, there.process)
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def test_what_a_set_policy_says_of_a_device_does_not_depend_on_their_order() -> None:
    there = env(num_devices=5)
    devices, world, _ = seen(there)
    made, order = policy("set", there), torch.tensor([3, 0, 4, 1, 2])
    one, server, value = made(devices, world)
    other, same_server, same_value = made(devices[:, order], world)
    torch.testing.assert_close(one[:, order], other)
    torch.testing.assert_close(server, same_server)
    torch.testing.assert_close(value, same_value)


def test_a_set_policy_steers_any_number_of_devices() -> None:
    made = policy("set", env(num_devices=3))
    assert isinstance(made, SetPolicy)
    returns = episode_returns(PolicyPlanner(made), env(num_envs=4, num_devices=40), seed=0)
    assert np.isfinite(returns).all()


def test_an_mlp_policy_is_for_one_number_of_devices() -> None:
    made = policy("mlp", env(num_devices=3))
    assert isinstance(made, MlpPolicy)
    assert np.isfinite(
        episode_returns(PolicyPlanner(made), env(num_envs=4, num_devices=3), seed=0)
    ).all()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        episode_returns(PolicyPlanner(made), env(num_envs=4, num_devices=4), seed=0)


@pytest.mark.parametrize("kind", ["set", "mlp"])
def test_what_is_not_feasible_is_never_drawn(kind: NetworkKind) -> None:
    there = env(num_envs=300, num_devices=4)
    made = policy(kind, there)
    devices, world, mask = seen(there)
    assert not mask.all()
    chances, _ = made.log_probs(devices, world, mask)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        action = made.action(choose(chances, generator))
        starts = np.concatenate([[0], np.cumsum(there.branches.sizes)[:-1]])
        picked = mask.gather(1, action + torch.from_numpy(starts))
        assert picked.all()
        assert there.single_action_space.contains(action[0].numpy())


def test_an_action_says_what_was_chosen() -> None:
    there = env(num_envs=2, num_devices=3)
    made = policy("set", there)
    choices = [torch.randint(0, n, (2, 3)) for n in there.branches.device.values()]
    choices += [torch.randint(0, n, (2, 1)) for n in there.branches.server.values()]
    read = there.process.read(made.action(choices).numpy())
    assert (read.takes_part == (choices[0].numpy() == 1)).all()
    assert (read.rung == choices[1].numpy()).all()
    assert (read.local_steps == choices[2].numpy()).all()
    assert (read.server_steps == choices[3][:, 0].numpy()).all()
    assert (read.realigns == (choices[4][:, 0].numpy() == 1)).all()


@pytest.mark.parametrize("kind", ["set", "mlp"])
def test_a_policy_that_was_saved_does_the_same(kind: NetworkKind, tmp_path: Path) -> None:
    there = env()
    made = policy(kind, there)
    made.see(*seen(there)[:2])
    save_policy(made, there.process, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy", there.process)
    for one, other in zip(made(*seen(there)[:2]), loaded(*seen(there)[:2]), strict=True):
        assert torch.equal(one, other)


def test_a_set_policy_is_for_any_number_of_devices_and_an_mlp_for_one(tmp_path: Path) -> None:
    kinds: tuple[NetworkKind, ...] = ("set", "mlp")
    for kind in kinds:
        save_policy(policy(kind, env()), env().process, tmp_path / kind)
    load_policy(tmp_path / "set", env(num_devices=7).process)
    message = "the policy is for another world: its num devices must be 7, got 3"
    with pytest.raises(CheckpointError, match=message):
        load_policy(tmp_path / "mlp", env(num_devices=7).process)


def test_a_policy_for_other_rungs_or_choices_is_refused(tmp_path: Path) -> None:
    save_policy(policy("set", env()), env().process, tmp_path / "policy")
    with pytest.raises(
        CheckpointError, match="its device branches must be {.*'bandwidth': 4}, got"
    ):
        load_policy(tmp_path / "policy", env(bandwidth="branch").process)
    record = json.loads((tmp_path / "policy" / "policy.json").read_text())
    renamed = json.dumps(record).replace("holds large", "holds huge")
    (tmp_path / "policy" / "policy.json").write_text(renamed)
    with pytest.raises(CheckpointError, match="its device features must be .*holds large.*huge"):
        load_policy(tmp_path / "policy", env().process)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("policy.json", None, "cannot read policy .*No such file"),
        ("policy.json", "{", "cannot read policy"),
        ("policy.json", "[]", "cannot read policy"),
        ("policy.json", '{"schema": 2, "network": "set"}', "must have schema 1 and a network of"),
        ("policy.safetensors", None, "cannot read policy"),
        ("policy.safetensors", "x" * 99, "cannot read policy"),
    ],
)
def test_a_damaged_policy_is_refused(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    save_policy(policy("set", env()), env().process, tmp_path / "policy")
    (tmp_path / "policy" / name).unlink()
    if content is not None:
        (tmp_path / "policy" / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_policy(tmp_path / "policy", env().process)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_policy(policy("set", env()), env().process, tmp_path / "policy")
    weights = load_file(tmp_path / "policy" / "policy.safetensors")
    name = "value_head.weight"
    save_file({**weights, name: weights[name][:, :3]}, tmp_path / "policy" / "policy.safetensors")
    with pytest.raises(CheckpointError, match="is damaged: .*size mismatch for value_head.weight"):
        load_policy(tmp_path / "policy", env().process)


def test_features_are_normalised_by_what_was_seen() -> None:
    made = policy("set", env())
    torch.manual_seed(1)
    batches = [(3 + 2 * torch.randn(50, 3, 17), 5 - 4 * torch.randn(50, 6)) for _ in range(40)]
    for devices, world in batches:
        made.see(devices, world)
    parts = [made.normalised(*batch) for batch in batches]
    for values in (
        torch.cat([p[0] for p in parts]).flatten(0, 1),
        torch.cat([p[1] for p in parts]),
    ):
        assert values.mean(0).abs().max() < 0.02
        assert (values.std(0) - 1).abs().max() < 0.02


def test_advantages_worked_by_hand_stop_at_the_end_of_an_episode() -> None:
    rewards = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])]
    values = [torch.tensor([v]) for v in (0.5, 0.25, 4.0, 8.0)]
    ends = [torch.tensor([False]), torch.tensor([True]), torch.tensor([False])]
    found = _advantages(rewards, values, ends, gamma=0.5, decay=0.5)[:, 0].tolist()
    last = 3 + 0.5 * 8 - 4
    second = 2 - 0.25
    first = 1 + 0.5 * 0.25 - 0.5 + 0.25 * second
    assert found == pytest.approx([first, second, last])


def loss_of(ratios: list[list[float]], ratio: Any, gain: float = 1.0) -> tuple[float, float]:
    logs = [torch.tensor([[math.log(r) for r in row]]) for row in ratios]
    relevant = [torch.ones_like(log, dtype=torch.bool) for log in logs]
    settings = SabppoSettings(ratio=ratio, clip_coef=0.2)
    loss, clipped, _ = _clipped_loss(logs, relevant, torch.tensor([gain]), settings)
    return float(loss), float(clipped)


def test_each_branch_is_clipped_by_itself() -> None:
    loss, clipped = loss_of([[1.1, 1.5], [0.5]], "branch")
    assert loss == pytest.approx(-(1.1 + 1.2 + 0.5))
    assert clipped == pytest.approx(2 / 3)
    assert loss_of([[1.1, 1.5], [0.5]], "branch", -1.0)[0] == pytest.approx(1.1 + 1.5 + 0.8)


def test_the_joint_ratio_is_clipped_as_one() -> None:
    assert loss_of([[1.1, 1.1], [1.1]], "joint") == pytest.approx((-1.2, 1))
    assert loss_of([[1.1, 1.1], [1.1]], "branch") == pytest.approx((-3.3, 0))


def test_both_losses_have_the_same_gradient_where_the_policy_has_not_moved() -> None:
    gradients = []
    for ratio in ("branch", "joint"):
        logs = [torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 1, requires_grad=True)]
        relevant = [torch.ones_like(log, dtype=torch.bool) for log in logs]
        settings = SabppoSettings(ratio=ratio)
        loss, _, _ = _clipped_loss(logs, relevant, torch.arange(4.0), settings)
        gradients.append(torch.autograd.grad(loss, logs))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_what_a_device_that_stays_out_would_do_does_not_count() -> None:
    there = env(num_envs=1, num_devices=3)
    choices = [torch.tensor([[1, 0, 1]])]
    choices += [torch.zeros(1, 3, dtype=torch.int64)] * 2
    choices += [torch.zeros(1, 1, dtype=torch.int64)] * 2
    found = [own.tolist() for own in _relevant(policy("set", there), choices)]
    in_part = [[True, False, True]]
    assert found == [[[True] * 3], in_part, in_part, [[True]], [[True]]]


@pytest.mark.parametrize("network", ["set", "mlp"])
def test_training_finds_what_pays(network: NetworkKind) -> None:
    lines: list[Progress] = []
    settings = SabppoSettings(
        total_steps=12_000, num_steps=8, learning_rate=3e-3, network=network, seed=1
    )
    trained = train_sabppo(env(num_envs=64), settings, lines.append)
    fresh = train_sabppo(env(num_envs=64), SHORT)
    ours, theirs = (
        episode_returns(PolicyPlanner(p, sample=True), env(num_envs=200), seed=9)
        for p in (trained, fresh)
    )
    assert ours.mean() > theirs.mean() + 4 * theirs.std() / 200**0.5
    assert ours.mean() > 1.3 * theirs.mean()
    assert lines[-1].entropy < lines[0].entropy
    assert all(not line.mean_return > 1 for line in lines)  # the most that an episode can bring
    assert lines[-1].num_steps == 12_000 // 512 * 512


def test_the_same_seed_trains_the_same_policy_and_leaves_the_random_stream_alone() -> None:
    before = torch.get_rng_state()
    states = [
        train_sabppo(env(), SabppoSettings(**(vars(SHORT) | {"seed": seed}))).state_dict()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "sabppo.total_steps must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "sabppo.learning_rate must be above 0, got nan"),
        ({"clip_coef": 0.0}, "sabppo.clip_coef must be above 0, got 0.0"),
        ({"gamma": 1.1}, r"sabppo.gamma must be in \[0, 1\], got 1.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SabppoSettings(**changes)


@pytest.mark.parametrize("kind", ["set", "mlp"])
def test_a_fresh_policy_would_rather_have_devices_take_part(kind: NetworkKind) -> None:
    there = env(num_envs=64)
    chances, _ = make_policy(kind, there.process).log_probs(*seen(there))
    able = there.process.world.feasible.any(-1)
    joins = chances[0][..., 1].exp()[torch.from_numpy(able)]
    assert joins.min() > 0.6
    assert joins.max() < 0.85
    for others in chances[3:]:
        even = 1 / others.shape[-1]
        assert torch.allclose(others.exp(), torch.tensor(even), atol=0.1)


def test_entropy_weighs_a_branch_as_much_however_many_devices_there_are() -> None:
    for count in (3, 30):
        even = torch.full((4, count, 2), 0.5).log()
        total, mean = _entropy([even], [torch.ones(4, count, dtype=torch.bool)])
        assert float(total) == pytest.approx(count)
        assert float(mean) == pytest.approx(1)


def test_a_round_counts_at_most_as_much_as_all_there_is_to_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[np.ndarray] = []
    seen_by = _Scale.seen

    def watched(self: _Scale, reward: np.ndarray, done: np.ndarray) -> np.ndarray:
        told.append(reward)
        return seen_by(self, reward, done)

    monkeypatch.setattr(_Scale, "seen", watched)
    rewards = np.resize([-1000.0, 0.25, 3.0], 16)
    monkeypatch.setattr(FederationProcess, "rewards", lambda *_: rewards.copy())
    train_sabppo(env(), SHORT)
    assert {tuple(reward) for reward in told} == {tuple(np.resize([-1.0, 0.25, 1.0], 16))}
