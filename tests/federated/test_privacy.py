"""Client-level privacy of a round, and what both levels say was spent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fakes import (
    FakeDevice,
    FakeTransport,
    PlanOf,
    adapter,
    everyone,
    federation,
    server_adding,
    silent,
    start,
    updating,
)
from fedpeat.control.fixed import FixedController
from fedpeat.core.noise import NoiseSource
from fedpeat.core.records import ClientPlan, RoundPlan
from fedpeat.core.wire import decode
from fedpeat.federated.accounting import epsilon_of, noise_for
from fedpeat.federated.privacy import ClientLevel, ExampleLevel, Privacy
from fedpeat.federated.robust import Defence

KEY = NoiseSource(bytes(32))
NORM_OF_ONE = np.sqrt(10)  # ten entries
CLIENT = ClientLevel(
    clip_norm=NORM_OF_ONE,
    noise_multiplier=0.0,
    rate=1.0,
    num_clients=4,
    server_ratio=None,
    delta=1e-5,
    noise=KEY,
)
EXAMPLE = ExampleLevel(
    batch_size=2,
    clip_norm=0.5,
    noise_multiplier=1.5,
    target_epsilon=None,
    num_steps=20,
    delta=1e-5,
)


def devices(*deltas: float) -> dict[str, FakeDevice]:
    return {f"d{i}": FakeDevice(delta) for i, delta in enumerate(deltas)}


def loop_of(transport: FakeTransport, client: ClientLevel, **changes: Any) -> Any:
    defence = Defence(clip_norm=client.clip_norm)
    return federation(transport, privacy=Privacy(client=client), defence=defence, **changes)


def entries(state: Any) -> np.ndarray:
    return np.concatenate([a.ravel() for a in state.adapter.values()])


def test_devices_count_alike_clipped_and_over_a_fixed_number() -> None:
    own = devices(0.5, 1, 1000)
    own["d0"].num_examples = 900
    plan = RoundPlan(tuple(ClientPlan(f"d{i}", "emulator", 2) for i in range(4)), 0)
    loop = loop_of(FakeTransport(own), CLIENT)
    state, result = loop.run_round(start(5.0), None)
    assert entries(state) == pytest.approx(5 + (0.5 + 1 + 1) / 3)
    assert [p.weight for p in result.participants] == pytest.approx([1 / 3] * 3)
    assert CLIENT.cohort_size(plan) == 4
    assert replace(CLIENT, rate=0.5).cohort_size(plan) == 2
    assert replace(CLIENT, rate=0.1).cohort_size(plan) == 1


def test_who_does_not_answer_leaves_the_denominator_as_it_was() -> None:
    transport = FakeTransport(devices(1, 1), {("train", "d1"): silent})
    state, _ = loop_of(transport, CLIENT, deadline_seconds=0.01).run_round(start(), None)
    assert entries(state) == pytest.approx(1 / 2)


def test_one_device_moves_the_sum_by_the_clip_norm_at_most() -> None:
    held = adapter()
    plan = RoundPlan(tuple(ClientPlan(f"d{i}", "emulator", 2) for i in range(2)), 0)
    pushed = {name: array + 1e6 for name, array in held.items()}

    def mean(*states: Any) -> np.ndarray:
        averaged = CLIENT.average(states, [False] * len(states), held, plan, 1)
        return np.concatenate([a.ravel() for a in averaged.tensors.values()])

    moved = 2 * (mean(held, pushed) - mean(held))
    assert np.linalg.norm(moved) == pytest.approx(NORM_OF_ONE, rel=1e-6)


def test_noise_has_the_multiple_of_the_clip_norm() -> None:
    noisy = replace(CLIENT, clip_norm=0.5, noise_multiplier=3.0)
    zeros = {"a": np.zeros((300, 300)), "b": np.zeros(1000)}
    drawn = np.concatenate([a.ravel() for a in noisy.noised(zeros, 1).values()])
    assert drawn.std() == pytest.approx(1.5, rel=0.02)
    again = np.concatenate([a.ravel() for a in noisy.noised(zeros, 2).values()])
    assert abs(np.corrcoef(drawn, again)[0, 1]) < 0.02
    assert len(np.unique(drawn)) == len(drawn)


def test_the_server_is_one_more_device_or_has_its_share_and_no_noise() -> None:
    noisy = replace(CLIENT, noise_multiplier=1.0)
    settings = {
        "controller": everyone(server_steps=1),
        "server_training": server_adding(50.0, num_examples=777),
    }
    for ratio, share in ((None, 0.25), (0.4, 0.4)):
        client = replace(noisy, server_ratio=ratio)
        loop = loop_of(FakeTransport(devices(1, 1, 1)), client, **settings)
        state, result = loop.run_round(start(), None)
        alone, _ = loop_of(FakeTransport(devices(1, 1, 1)), client).run_round(start(), None)
        assert result.participants[-1].weight == pytest.approx(share)
        np.testing.assert_allclose(
            entries(state), share * 50 + (1 - share) * entries(alone), rtol=1e-5
        )


@pytest.mark.parametrize("scripts", [{}, {("train", "d0"): silent, ("train", "d1"): silent}])
def test_a_round_without_updates_is_noise_all_the_same(scripts: Any) -> None:
    nobody = FixedController(
        rung="emulator",
        fraction_train=1e-9,
        local_steps=2,
        server_steps=0,
        seed=0,
        is_poisson=True,
    )
    controller = everyone() if scripts else nobody
    transport = FakeTransport(devices(1, 1), scripts)
    client = replace(CLIENT, noise_multiplier=1.0)
    loop = loop_of(transport, client, controller=controller, deadline_seconds=0.01)
    state, result = loop.run_round(start(), None)
    assert np.all(entries(state) != 0)
    assert state.num_barren_rounds == 0
    assert result.privacy["client_epsilon"] > 0


def test_nobody_who_chooses_is_told_a_devices_loss() -> None:
    spy = PlanOf(everyone().plan)
    loop = loop_of(FakeTransport(devices(1, 1)), CLIENT, controller=spy)
    state, _ = loop.run_round(start(), None)
    assert state.last_losses == {"d0": 2.5, "d1": 2.5}
    loop.run_round(state, None)
    assert [client.last_loss for client in spy.seen[1].clients] == [None, None]


def test_devices_are_drawn_each_by_itself() -> None:
    controller = FixedController(
        rung="emulator", fraction_train=0.3, local_steps=2, server_steps=0, seed=1, is_poisson=True
    )
    draws = [controller._drawn_each([f"d{i}" for i in range(20)], r) for r in range(500)]  # noqa: SLF001
    sizes = np.array([len(drawn) for drawn in draws])
    assert sizes.mean() == pytest.approx(6, abs=0.3)
    assert sizes.var() == pytest.approx(20 * 0.3 * 0.7, rel=0.25)
    again = controller._drawn_each(["d3", "d7"], 4)  # noqa: SLF001
    assert again == [name for name in draws[4] if name in {"d3", "d7"}]


# --- what was spent -------------------------------------------------------------------------------


def test_the_epsilon_of_devices_grows_with_the_rounds() -> None:
    client = replace(CLIENT, noise_multiplier=2.0, rate=0.5)
    loop = loop_of(FakeTransport(devices(1, 1)), client)
    state, first = loop.run_round(start(), None)
    _, second = loop.run_round(state, None)
    assert first.privacy == {
        "client_epsilon": epsilon_of({(2.0, 0.5): 1}, 1e-5),
        "client_sample_rate": 0.5,
        "delta": 1e-5,
    }
    assert second.privacy["client_epsilon"] == epsilon_of({(2.0, 0.5): 2}, 1e-5)


def test_examples_are_hidden_by_what_devices_are_told_and_every_step_asked_for_counts() -> None:
    own = devices(1, 1)
    own["d1"].num_examples = 20
    hidden: dict[str, Any] = {"first_loss": None, "last_loss": None, "mean_loss": None}
    scripts = {("train", "d0"): updating(**hidden), ("train", "d1"): silent}
    transport = FakeTransport(own, scripts)
    loop = federation(transport, privacy=Privacy(example=EXAMPLE), deadline_seconds=0.01)
    state, result = loop.run_round(start(), None)
    tasks = [decode(content).record for kind, _, content in transport.sent if kind == "train"]
    assert {
        (t["settings"]["noise_multiplier"], t["settings"]["example_clip_norm"]) for t in tasks
    } == {(1.5, 0.5)}
    assert state.private_steps == {"d0": {"10": 2}, "d1": {"20": 2}}
    epsilons = {p.client_id: p.epsilon for p in result.participants}
    assert epsilons == {
        "d0": epsilon_of({(1.5, 0.2): 2}, 1e-5),
        "d1": epsilon_of({(1.5, 0.1): 2}, 1e-5),
    }
    assert result.privacy == {"example_epsilon": epsilons["d0"], "delta": 1e-5}
    assert (result.train_loss, state.last_losses) == (None, {})
    state, _ = loop.run_round(state, None)
    assert state.private_steps == {"d0": {"10": 4}, "d1": {"20": 4}}


def test_a_device_that_tells_its_losses_all_the_same_is_refused() -> None:
    loop = federation(FakeTransport(devices(1)), privacy=Privacy(example=EXAMPLE))
    _, result = loop.run_round(start(), None)
    assert result.participants[0].reason == "first_loss must be None, got 3.0"


def test_without_privacy_a_device_must_tell_its_losses() -> None:
    scripts = {("train", "d0"): updating(first_loss=None)}
    _, result = federation(FakeTransport(devices(1), scripts)).run_round(start(), None)
    assert result.participants[0].reason.startswith("first_loss must be a number")


def test_a_target_gives_each_device_the_noise_for_its_number_of_examples() -> None:
    target = replace(EXAMPLE, noise_multiplier=None, target_epsilon=2.0)
    few, many = target.noise_of(10), target.noise_of(100)
    assert (few, many) == (noise_for(2.0, 0.2, 20, 1e-5), noise_for(2.0, 0.02, 20, 1e-5))
    assert few > many
    assert 1.9 < target.epsilon({"100": 20}) <= 2.0
    assert target.epsilon({"10": 5, "100": 5}) < 2.0


def test_a_device_that_goes_away_before_it_is_asked_spends_nothing() -> None:
    plan = RoundPlan((ClientPlan("a", "emulator", 3), ClientPlan("b", "emulator", 3, "gone")), 0)
    assert EXAMPLE.after({"a": {"10": 1}}, plan, {"a": 10, "b": 10}) == {"a": {"10": 4}}
