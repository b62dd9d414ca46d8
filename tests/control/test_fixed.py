"""The controller that plans the same for everyone."""

from __future__ import annotations

from collections import Counter

import pytest

from fedpeat.control.fixed import FixedController
from fedpeat.core.records import ClientPlan, ClientState, RoundObservation


def controller(fraction_train: float = 1.0, seed: int = 0) -> FixedController:
    return FixedController(
        rung="emulator", fraction_train=fraction_train, local_steps=5, server_steps=3, seed=seed
    )


def observation(num_clients: int, server_round: int = 1, **client: float) -> RoundObservation:
    clients = tuple(
        ClientState(f"c{i:03d}", num_examples=10, last_loss=client.get("last_loss"))
        for i in range(num_clients)
    )
    return RoundObservation(server_round, num_rounds=10, clients=clients)


def cohort(
    fraction_train: float, num_clients: int, server_round: int = 1, seed: int = 0
) -> list[str]:
    plan = controller(fraction_train, seed).plan(observation(num_clients, server_round))
    return [client.client_id for client in plan.cohort]


def test_everyone_gets_the_same_rung_and_steps() -> None:
    plan = controller().plan(observation(2))
    assert plan.cohort == (ClientPlan("c000", "emulator", 5), ClientPlan("c001", "emulator", 5))
    assert plan.server_steps == 3


def test_a_device_gets_its_own_rung_whoever_else_is_there() -> None:
    own = {"c000": "small", "c002": "large", "c009": "small"}
    some = FixedController(
        rung="medium",
        fraction_train=1.0,
        local_steps=5,
        server_steps=3,
        seed=0,
        client_rungs=own,
    )
    plans = some.plan(observation(4)).cohort
    assert [plan.rung for plan in plans] == ["small", "medium", "large", "medium"]


@pytest.mark.parametrize(
    ("fraction", "num_clients", "want"),
    [(1.0, 7, 7), (0.5, 10, 5), (0.3, 10, 3), (0.26, 10, 3), (0.01, 10, 1), (0.001, 1, 1)],
)
def test_cohort_is_the_fraction_and_at_least_one(
    fraction: float, num_clients: int, want: int
) -> None:
    drawn = cohort(fraction, num_clients)
    assert len(drawn) == len(set(drawn)) == want


def test_without_clients_the_server_is_alone() -> None:
    plan = controller(0.5).plan(observation(0))
    assert (plan.cohort, plan.server_steps) == ((), 3)


def test_a_round_draws_the_same_in_any_process_and_order() -> None:
    rounds = [cohort(0.3, 10, r) for r in (1, 2, 3)]
    one = controller(0.3)
    backwards = [one.plan(observation(10, r)).cohort for r in (3, 2, 1)]
    assert [[c.client_id for c in plan] for plan in reversed(backwards)] == rounds


def test_rounds_and_seeds_draw_differently() -> None:
    assert len({tuple(cohort(0.3, 20, r)) for r in range(1, 9)}) > 1
    assert len({tuple(cohort(0.3, 20, seed=s)) for s in range(8)}) > 1


def test_each_client_is_drawn_about_equally_often() -> None:
    counts = Counter(c for r in range(1, 1001) for c in cohort(0.3, 10, r))
    # 1000 draws with probability 0.3 each: 300, standard deviation 14.5
    assert len(counts) == 10
    assert all(abs(count - 300) < 5 * 14.5 for count in counts.values())


def test_draw_does_not_depend_on_what_clients_report() -> None:
    low = controller(0.3).plan(observation(10, last_loss=0.1))
    high = controller(0.3).plan(observation(10, last_loss=99.0))
    assert low == high


def test_state_is_empty_and_another_is_refused() -> None:
    one = controller()
    assert one.state() == {}
    one.load_state({})
    with pytest.raises(ValueError, match="no state, got \\['weights'\\]"):
        one.load_state({"weights": [1]})
