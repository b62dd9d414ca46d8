"""What few hostile updates can do to an average, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import trim_mean

from fakes import (
    FakeDevice,
    FakeTransport,
    adapter,
    everyone,
    federation,
    saying,
    server_adding,
    start,
    updating,
)
from fedpeat.core.errors import AggregationError, ConfigError
from fedpeat.core.records import ParticipantResult, RoundResult
from fedpeat.federated.admission import Outcome
from fedpeat.federated.aggregation import LoraAggregation
from fedpeat.federated.robust import (
    ROBUST_RULES,
    Averaged,
    Defence,
    coordinate_median,
    multi_krum,
    trimmed_mean,
)
from fedpeat.federated.rounds import FederationState

States = list[dict[str, np.ndarray]]


def states(*values: Sequence[float], name: str = "x") -> States:
    return [{name: np.array(value, np.float32)} for value in values]


def random_states(n: int, seed: int = 0) -> States:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": (5,), "c": ()}
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(n)
    ]


def flat(state: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(state[name]).astype(np.float64) for name in sorted(state)])


def accepted(client_id: str, values: Sequence[float], begin: Sequence[float]) -> Outcome:
    role: Any = "server" if client_id == "server" else "device"
    result = ParticipantResult(client_id, role, "accepted", num_examples=10)
    (arrays,), (before,) = states(values), states(begin)
    return Outcome(result, arrays, 0.0, before)


# --- the rules, by hand -------------------------------------------------------------------------


def test_median_takes_the_middle_of_every_entry() -> None:
    centre, shares = coordinate_median(states([0, 9], [1, 7], [50, 8]))
    np.testing.assert_array_equal(centre["x"], [1, 8])
    assert shares == [1 / 3] * 3


def test_median_of_an_even_number_is_half_way_between_the_two_in_the_middle() -> None:
    centre, _ = coordinate_median(states([0.0], [1.0], [4.0], [100.0]))
    np.testing.assert_array_equal(centre["x"], [2.5])


def test_trimmed_mean_leaves_out_the_ends_of_every_entry() -> None:
    centre, _ = trimmed_mean(states([0, -99], [1, 1], [2, 2], [4, 3], [99, 4]), 1)
    np.testing.assert_allclose(centre["x"], [7 / 3, 2])


def test_multi_krum_leaves_out_those_far_from_most_others() -> None:
    # n = 7, f = 2: of each, the 3 nearest count; 5 are taken
    centre, shares = multi_krum(states([0], [1], [2], [3], [4], [40], [-50]), 2)
    np.testing.assert_allclose(centre["x"], [2.0])
    assert shares == [0.2] * 5 + [0, 0]


def test_multi_krum_scores_by_the_nearest_but_for_the_attackers_and_two() -> None:
    # n = 5, f = 1, so the 2 nearest: scores 29, 13, 34, 26, 37; 3 would leave out 0, and 1 5
    assert multi_krum(states([0], [2], [5], [10], [11]), 1)[1] == [0.25] * 4 + [0]


def test_multi_krum_sees_what_a_device_holds_as_one_vector() -> None:
    far = {"x": np.array([0.1], np.float32), "y": np.array([30.0], np.float32)}
    near = [
        {"x": np.array([v], np.float32), "y": np.array([0.0], np.float32)}
        for v in (0.0, 0.2, 0.3, 0.4)
    ]
    assert multi_krum([far, *near], 1)[1] == [0, 0.25, 0.25, 0.25, 0.25]


def test_multi_krum_leaves_an_outlier_among_few_neighbours_out_by_its_score_not_its_pair() -> None:
    # two attackers that agree with each other are near each other: 3 neighbours must be counted
    honest = [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert multi_krum(states(*honest, [60], [60]), 2)[1][5:] == [0, 0]


# --- against independent references -------------------------------------------------------------


@pytest.mark.parametrize(("n", "num_attackers"), [(3, 1), (10, 2), (11, 5), (7, 0)])
def test_trimmed_mean_matches_scipy(n: int, num_attackers: int) -> None:
    own = random_states(n)
    centre, _ = trimmed_mean(own, num_attackers)
    for name, array in centre.items():
        stack = np.stack([s[name].astype(np.float64) for s in own])
        np.testing.assert_allclose(array, trim_mean(stack, (num_attackers + 0.5) / n), rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_multi_krum_matches_a_naive_loop(seed: int) -> None:
    n, f = 9, 2
    own = random_states(n, seed)
    vectors = [flat(s) for s in own]
    scores = []
    for i in range(n):
        others = sorted(sum((vectors[i] - vectors[j]) ** 2) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    chosen = sorted(range(n), key=lambda i: scores[i])[: n - f]
    centre, shares = multi_krum(own, f)
    assert [i for i, share in enumerate(shares) if share] == sorted(chosen)
    np.testing.assert_allclose(flat(centre), np.mean([vectors[i] for i in chosen], axis=0))


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ROBUST_RULES)
@pytest.mark.parametrize("seed", range(3))
def test_no_rule_depends_on_the_order_of_updates(rule: str, seed: int) -> None:
    own = random_states(9)
    order = np.random.default_rng(seed).permutation(9)
    centre, shares = ROBUST_RULES[rule][0](own, 2)
    other, other_shares = ROBUST_RULES[rule][0]([own[i] for i in order], 2)
    np.testing.assert_allclose(flat(other), flat(centre), rtol=1e-14)
    assert other_shares == [shares[i] for i in order]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@pytest.mark.parametrize("attack", [1e30, -1e30, 0.9, 0.0, -3.0])
@pytest.mark.parametrize("seed", range(3))
def test_attackers_move_no_entry_out_of_the_honest_range(
    rule: str, attack: float, seed: int
) -> None:
    own = random_states(11, seed)
    honest, num_attackers = own[:7], 4
    rng = np.random.default_rng(seed)
    for state in own[7:]:
        for name, array in state.items():
            wild = attack * rng.choice([-1, 1], size=array.shape) if seed else attack
            state[name] = np.full(array.shape, wild, np.float32)
    centre = flat(ROBUST_RULES[rule][0](own, num_attackers)[0])
    values = np.stack([flat(s) for s in honest])
    assert (values.min(0) <= centre).all()
    assert (centre <= values.max(0)).all()


@pytest.mark.parametrize("distance", [1e3, 1e30])
def test_attackers_far_away_never_count_in_multi_krum(distance: float) -> None:
    own = random_states(9)
    for state in own[7:]:
        state["b"] = np.full(5, distance, np.float32)
    assert multi_krum(own, 2)[1] == [1 / 7] * 7 + [0, 0]


def test_one_update_moves_a_plain_mean_anywhere() -> None:
    """What the rules are for: without one there is no such bound."""
    averaged = average(Defence(), states([0.0], [1.0], [2.0], [1e30]))
    assert averaged[0]["x"] > 1e29


def test_medians_of_both_factors_may_leave_the_honest_range_of_their_product() -> None:
    """Two honest devices have BA = 0; the median factors, with one attacker, have BA = 1."""
    factors = [{"B": 1.0, "A": 0.0}, {"B": 0.0, "A": 1.0}, {"B": 1.0, "A": 1.0}]
    own = [{n: np.array([[v]], np.float32) for n, v in pair.items()} for pair in factors]
    assert [float((s["B"] @ s["A"]).item()) for s in own[:2]] == [0, 0]
    centre, _ = coordinate_median(own)
    assert (centre["B"] @ centre["A"]).item() == 1


# --- clipping -----------------------------------------------------------------------------------


def test_an_update_is_scaled_down_to_the_bound_from_where_it_began() -> None:
    far = accepted("a", [4.0, 6.0], begin=[1.0, 2.0])  # (3, 4) long 5
    near = accepted("b", [1.0, 3.0], begin=[1.0, 2.0])
    clipped, kept = Defence(clip_norm=2.5).clipped([far, near])
    np.testing.assert_allclose(clipped.arrays["x"], [2.5, 4.0])
    assert clipped.result.clip_ratio == 0.5
    assert kept.arrays is near.arrays
    assert kept.result.clip_ratio == 1
    assert clipped.arrays["x"].dtype == np.float32


def test_the_median_norm_of_devices_is_a_bound_too() -> None:
    updates = [accepted(c, [v], begin=[0.0]) for c, v in zip("abc", (1, 3, 90), strict=True)]
    server = accepted("server", [1000.0], begin=[0.0])
    clipped = Defence(clip_to_median=True).clipped([*updates, server])
    assert [float(u.arrays["x"][0]) for u in clipped] == pytest.approx([1, 3, 3, 1000])
    assert [u.result.clip_ratio for u in clipped] == pytest.approx([1, 1, 1 / 30, None])


def test_the_server_is_not_clipped() -> None:
    server = accepted("server", [1000.0], begin=[0.0])
    assert Defence(clip_norm=1.0).clipped([server]) == [server]


def test_without_a_bound_nothing_is_touched() -> None:
    updates = [accepted("a", [1e9], begin=[0.0])]
    assert Defence().clipped(updates) == updates


# --- who is enough ------------------------------------------------------------------------------


def test_at_least_one_attacker_is_assumed_and_never_more_than_the_share() -> None:
    counts = [Defence(attackers_ratio=0.3).num_attackers(n) for n in (1, 3, 4, 9, 10, 20)]
    assert counts == [1, 1, 1, 2, 3, 6]
    assert Defence(attackers_ratio=0.29).num_attackers(100) == 29  # 0.29 * 100 is a bit less
    assert Defence(attackers_ratio=0.0).num_attackers(100) == 0


@pytest.mark.parametrize(
    ("rule", "ratio", "fewest"),
    [("median", 0.2, 3), ("trimmed_mean", 0.4, 3), ("multi_krum", 0.2, 5), ("multi_krum", 0, 3)],
)
def test_a_rule_says_how_many_updates_it_needs(rule: str, ratio: float, fewest: int) -> None:
    defence = Defence(rule, ratio)
    defence.check_cohort(fewest)
    assert not defence.shortage(fewest)
    with pytest.raises(ConfigError) as caught:
        defence.check_cohort(fewest - 1)
    num_attackers = 1 if ratio else 0
    assert str(caught.value) == (
        "federated.robust_rule must be one for which the devices of a round are enough, got "
        f"{rule!r} with {fewest - 1}: {rule} against {num_attackers} of {fewest - 1} needs at "
        f"least {fewest}"
    )


def test_multi_krum_needs_more_than_two_honest_devices_beside_those_that_outvote() -> None:
    assert Defence("multi_krum", 0.3).shortage(8) == ""  # f = 2
    assert Defence("multi_krum", 0.4).shortage(10) == (
        "multi_krum against 4 of 10 needs at least 11"
    )


# --- what a rule makes of a round ---------------------------------------------------------------


def average(
    defence: Defence,
    own: States,
    weights: Sequence[float] | None = None,
    trusted: Sequence[bool] | None = None,
    current: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], list[float], tuple[str, ...]]:
    n = len(own)
    averaged = defence.average(
        own,
        weights or [1 / n] * n,
        trusted or [False] * n,
        current or own[0],
        LoraAggregation(),
    )
    return averaged.tensors, averaged.weights, averaged.warnings


def test_the_server_is_averaged_with_what_the_rule_makes_of_devices() -> None:
    own = states([0.0], [1.0], [1000.0], [5.0])
    tensors, weights, warnings = average(
        Defence("median"), own, [0.2, 0.2, 0.2, 0.4], [False, False, False, True]
    )
    np.testing.assert_allclose(tensors["x"], [0.6 * 1 + 0.4 * 5])
    assert weights == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert tensors["x"].dtype == np.float32
    assert warnings == ()


def test_devices_that_multi_krum_leaves_out_weigh_nothing() -> None:
    own = states([0.0], [1.0], [2.0], [3.0], [99.0], [7.0])
    tensors, weights, _ = average(
        Defence("multi_krum"), own, [0.1] * 5 + [0.5], [False] * 5 + [True]
    )
    np.testing.assert_allclose(tensors["x"], [0.5 * 1.5 + 0.5 * 7])
    assert weights == pytest.approx([0.125] * 4 + [0, 0.5])


def test_without_a_rule_the_average_is_the_plain_one_to_the_bit() -> None:
    own, weights = random_states(6), [0.1, 0.2, 0.05, 0.25, 0.15, 0.25]
    plain = LoraAggregation().average(own, weights, own[0])
    tensors, same, _ = average(Defence(), own, weights)
    assert {n: a.tobytes() for n, a in tensors.items()} == {
        n: a.tobytes() for n, a in plain.items()
    }
    assert same == weights


def test_each_tensor_is_defended_among_those_who_hold_it() -> None:
    # "low" is held by all six; "high" by three devices and the server; "lost" by nobody
    values = [(1, 10), (2, 20), (3, 900), (4, None), (5, None), (0, 40)]
    own = [
        {"low": np.array([low], np.float32)}
        | ({} if high is None else {"high": np.array([high], np.float32)})
        for low, high in values
    ]
    current = {name: np.zeros(1, np.float32) for name in ("low", "high", "lost")}
    weights, trusted = [0.1] * 5 + [0.5], [False] * 5 + [True]
    tensors, shares, warnings = average(Defence("median"), own, weights, trusted, current)
    assert sorted(tensors) == ["high", "low"]
    np.testing.assert_allclose(tensors["high"], [(0.3 * 20 + 0.5 * 40) / 0.8])
    np.testing.assert_allclose(tensors["low"], [0.5 * 3 + 0.5 * 0])
    assert sum(shares) == pytest.approx(1)
    assert warnings == ()


def test_a_tensor_that_too_few_devices_hold_takes_nothing_from_them() -> None:
    own = [{"low": np.full(3, v, np.float32)} for v in (1.0, 2.0, 3.0)]
    own[0]["high"] = np.full(1, 1e9, np.float32)
    own.append({name: np.full(size, 7.0, np.float32) for name, size in (("low", 3), ("high", 1))})
    current = {"low": np.zeros(3, np.float32), "high": np.zeros(1, np.float32)}
    weights, trusted = [0.2] * 3 + [0.4], [False] * 3 + [True]
    tensors, shares, warnings = average(Defence("trimmed_mean"), own, weights, trusted, current)
    np.testing.assert_allclose(tensors["high"], [7])
    np.testing.assert_allclose(tensors["low"], [0.6 * 2 + 0.4 * 7] * 3)
    assert shares == pytest.approx([0.15] * 3 + [0.55])  # of 3 entries 0.2 each, of 1 none
    assert warnings == (
        "1 pieces of the adapter take nothing from devices: trimmed_mean against 1 of 1 needs at "
        "least 3",
    )


def test_a_tensor_that_too_few_devices_and_no_server_hold_stays_as_it_is() -> None:
    own = [{"low": np.ones(1, np.float32)} for _ in range(3)]
    own[0]["high"] = np.full(1, 1e9, np.float32)
    current = {"low": np.zeros(1, np.float32), "high": np.zeros(1, np.float32)}
    tensors, _, warnings = average(Defence("median"), own, current=current)
    assert sorted(tensors) == ["low"]
    assert len(warnings) == 1


# --- in the round loop --------------------------------------------------------------------------


def devices(*deltas: float, num_examples: int = 10) -> dict[str, FakeDevice]:
    names = [f"d{i}" for i in range(len(deltas))]
    return {n: FakeDevice(v, num_examples) for n, v in zip(names, deltas, strict=True)}


def value_of(state: FederationState) -> float:
    values = {float(v) for a in state.adapter.values() for v in a.reshape(-1)}
    assert len(values) == 1
    return values.pop()


def statuses(result: RoundResult) -> dict[str, str]:
    return {p.client_id: p.status for p in result.participants}


@pytest.mark.parametrize(
    ("rule", "value"), [("median", 3.0), ("trimmed_mean", 3.0), ("multi_krum", 2.5)]
)
def test_a_round_with_a_hostile_device_gives_what_the_rule_says(rule: str, value: float) -> None:
    transport = FakeTransport(devices(1, 2, 3, 4, 1000))
    state, result = federation(transport, defence=Defence(rule)).run_round(start(), None)
    assert value_of(state) == pytest.approx(value)
    hostile = result.participants[-1].weight
    assert hostile == (0 if rule == "multi_krum" else 0.2)
    assert sum(p.weight for p in result.participants) == pytest.approx(1)


def test_a_round_says_what_its_average_had_to_leave_out() -> None:
    class Short(Defence):
        def average(self, *args: Any) -> Averaged:
            return replace(super().average(*args), warnings=("x is left out",))

    _, result = federation(FakeTransport(devices(1, 2)), defence=Short()).run_round(start(), None)
    assert result.warnings == ("x is left out",)


def test_a_round_clips_to_the_bound_and_says_by_how_much() -> None:
    norm_of_one = np.sqrt(10)  # ten entries
    transport = FakeTransport(devices(1, 2, 1000))
    defence = Defence(clip_norm=2 * norm_of_one)
    state, result = federation(transport, defence=defence).run_round(start(5.0), None)
    assert value_of(state) == pytest.approx(5 + (1 + 2 + 2) / 3)
    assert [p.clip_ratio for p in result.participants] == pytest.approx([1, 1, 0.002])


@pytest.mark.parametrize("ratio", [None, 0.25])
def test_the_server_counts_beside_the_rule_with_its_share(ratio: float | None) -> None:
    loop = federation(
        FakeTransport(devices(1, 2, 1000)),
        defence=Defence("median", clip_norm=None),
        controller=everyone(server_steps=1),
        server_training=server_adding(50.0, num_examples=10),
        server_weight_ratio=ratio,
    )
    state, result = loop.run_round(start(), None)
    share = 0.25  # 10 of 40 examples
    assert value_of(state) == pytest.approx(share * 50 + (1 - share) * 2)
    assert result.participants[-1].weight == pytest.approx(share)


def test_claimed_examples_take_no_share_from_the_server_under_a_rule() -> None:
    own = devices(1, 2, 3)
    own["d2"].num_examples = 1000
    loop = federation(
        FakeTransport(own),
        defence=Defence("median"),
        controller=everyone(server_steps=1),
        server_training=server_adding(50.0, num_examples=10),
    )
    state, result = loop.run_round(start(), None)
    assert [p.weight for p in result.participants] == pytest.approx([0.25] * 4)
    assert [p.num_examples for p in result.participants] == [10, 10, 1000, 10]
    assert value_of(state) == pytest.approx(0.25 * 50 + 0.75 * 2)


def test_too_few_devices_for_the_rule_leave_the_round_to_the_server() -> None:
    scripts = {("train", "d2"): saying(b"junk")}
    loop = federation(
        FakeTransport(devices(1, 2, 3), scripts),
        defence=Defence("median"),
        controller=everyone(server_steps=1),
        server_training=server_adding(50.0),
    )
    state, result = loop.run_round(start(), None)
    assert value_of(state) == 50
    assert [p.weight for p in result.participants] == [0, 0, 0, 1]
    assert result.warnings == (
        "the updates of 2 devices are left out: median against 1 of 2 needs at least 3",
    )


def test_too_few_devices_and_no_server_leave_the_adapter_as_it_was() -> None:
    loop = federation(FakeTransport(devices(1, 2)), defence=Defence("median"))
    state, result = loop.run_round(start(7.0), None)
    assert value_of(state) == 7
    assert state.num_barren_rounds == 1
    assert any("the adapter stays as it was: 0 updates accepted" in w for w in result.warnings)
    assert any("median against 1 of 2 needs at least 3" in w for w in result.warnings)


# --- devices set aside --------------------------------------------------------------------------


def rounds(loop: Any, state: FederationState, n: int) -> tuple[FederationState, list[RoundResult]]:
    results = []
    for _ in range(n):
        state, result = loop.run_round(state, None)
        results.append(result)
    return state, results


def test_a_device_whose_updates_are_rejected_is_set_aside_and_named_once() -> None:
    transport = FakeTransport(devices(1, 2, 3), {("train", "d1"): updating(float("nan"))})
    loop = federation(transport, defence=Defence(max_rejections=2))
    state, results = rounds(loop, start(), 4)
    assert [statuses(r).get("d1") for r in results] == ["rejected", "rejected", None, None]
    assert [r.set_aside for r in results] == [(), ("d1",), ("d1",), ("d1",)]
    assert [len(r.warnings) for r in results] == [0, 1, 0, 0]
    assert (
        results[1]
        .warnings[0]
        .startswith(
            "'d1' is set aside from now on: 2 of its updates were rejected, the last one since "
        )
    )
    assert state.num_rejections == {"d1": 2}
    assert [kind for kind, node, _ in transport.sent if node == "d1"].count("hello") == 2


def test_rejections_need_not_be_in_a_row() -> None:
    transport = FakeTransport(devices(1, 2, 3))
    loop = federation(transport, defence=Defence(max_rejections=2))
    state = start()
    for is_bad in (True, False, True, False):
        transport.scripts = {("train", "d0"): saying(b"junk")} if is_bad else {}
        state, result = loop.run_round(state, None)
    assert result.set_aside == ("d0",)


def test_what_is_not_rejected_is_not_held_against_a_device() -> None:
    transport = FakeTransport(devices(1, 2), {("train", "d0"): lambda _: None})
    loop = federation(transport, defence=Defence(max_rejections=1), deadline_seconds=0.01)
    state, result = loop.run_round(start(), None)
    assert statuses(result)["d0"] == "late"
    assert (state.num_rejections, result.set_aside) == ({}, ())


def test_without_the_setting_nobody_is_counted_or_set_aside() -> None:
    loop = federation(FakeTransport(devices(1, 2), {("train", "d0"): saying(b"junk")}))
    state, results = rounds(loop, start(), 4)
    assert state.num_rejections == {}
    assert {r.set_aside for r in results} == {()}


def test_a_federation_of_devices_set_aside_says_so_and_ends() -> None:
    scripts = {("train", name): saying(b"junk") for name in ("d0", "d1")}
    loop = federation(FakeTransport(devices(1, 2), scripts), defence=Defence(max_rejections=1))
    state, result = loop.run_round(start(), None)
    assert result.set_aside == ("d0", "d1")
    with pytest.raises(AggregationError, match="nobody took part"):
        rounds(loop, state, 2)


def test_a_defended_round_keeps_shapes_and_types() -> None:
    loop = federation(FakeTransport(devices(1, 2, 3, 4, 5)), defence=Defence("multi_krum"))
    state, _ = loop.run_round(start(), None)
    assert {n: (a.shape, a.dtype) for n, a in state.adapter.items()} == {
        n: (a.shape, a.dtype) for n, a in adapter().items()
    }
