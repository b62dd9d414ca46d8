"""Averages and server optimisers against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest

from fedpeat.config.loading import setting_types
from fedpeat.core.errors import AggregationError
from fedpeat.federated.aggregation import (
    SERVER_OPTIMIZERS,
    TUNED_PARTS,
    LoraAggregation,
    ServerOptimizer,
    update_norm,
    weighted_average,
)


def state(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, np.float32)}


def two_steps(opt: ServerOptimizer, first: list[float], second: list[float]) -> list[list[float]]:
    """Start at zero, step to two averages, and return where that leads."""
    zero = {"w": np.zeros(len(first), np.float32)}
    one, moments = opt.step(zero, state(*first), {})
    two, _ = opt.step(one, state(*second), moments)
    return [one["w"].tolist(), two["w"].tolist()]


# --- averages -----------------------------------------------------------------------------------


def test_weighted_average_matches_hand_calculation() -> None:
    states = [{"lora_A": np.array([0.0, 2.0])}, {"lora_A": np.array([4.0, 6.0])}]
    average = weighted_average(states, weights=[3, 1])
    np.testing.assert_array_equal(average["lora_A"], [1.0, 3.0])


def test_average_keeps_every_tensor_its_shape_and_its_type() -> None:
    one: dict[str, np.ndarray] = {"A": np.ones((2, 3), np.float32), "B": np.ones((), np.float64)}
    average = weighted_average([one, one], [0.5, 0.5])
    assert {n: (a.shape, a.dtype.name) for n, a in average.items()} == {
        "A": ((2, 3), "float32"),
        "B": ((), "float64"),
    }


def test_sums_are_float64() -> None:
    # In float32, 2^24 + 1 is 2^24, and the ones would all be lost.
    states = [state(2.0**24), *[state(1.0)] * 4, state(-(2.0**24))]
    assert weighted_average(states, [1] * 6)["w"].item() == np.float32(4 / 6)


def test_average_of_one_update_is_that_update() -> None:
    new = {"w": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    np.testing.assert_array_equal(weighted_average([new], [0.1])["w"], new["w"])


def test_only_the_ratios_of_weights_matter() -> None:
    states = [state(1.0, 5.0), state(2.0, -7.0)]
    small, large = weighted_average(states, [0.25, 0.75]), weighted_average(states, [10, 30])
    np.testing.assert_array_equal(small["w"], large["w"])


def test_average_of_the_largest_floats_stays_finite() -> None:
    largest = float(np.finfo(np.float32).max)
    assert weighted_average([state(largest)] * 3, [1, 1, 1])["w"].item() == largest


@pytest.mark.parametrize(
    "weights",
    [
        [0.0, 0.0],
        [-1.0, 2.0],
        [2.0, -1.0],
        [math.nan, 1.0],
        [1.0, math.nan],
        [math.inf, 1.0],
        [1.0],
        [1.0] * 3,
    ],
    ids=str,
)
def test_weights_that_make_no_average_are_refused(weights: list[float]) -> None:
    with pytest.raises(AggregationError, match="weight"):
        weighted_average([state(1.0), state(2.0)], weights)


def test_nothing_to_average_is_refused() -> None:
    with pytest.raises(AggregationError, match="at least one update"):
        weighted_average([], [])


def test_a_weight_of_zero_switches_one_update_off() -> None:
    assert weighted_average([state(1.0), state(9.0)], [1.0, 0.0])["w"].item() == 1.0


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("average", ["all"] * 4),
        ("ffa", ["lora_B"] * 4),
        ("rolora", ["lora_B", "lora_A", "lora_B", "lora_A"]),
        ("svd", ["all"] * 4),
    ],
)
def test_what_the_first_rounds_tune(rule: str, parts: list[str]) -> None:
    assert [LoraAggregation(rule).tuned_part(k) for k in (1, 2, 3, 4)] == parts


@pytest.mark.parametrize("rule", TUNED_PARTS)
def test_every_rule_refuses_weights_that_make_no_average(rule: str) -> None:
    pair = {"x.lora_A.weight": np.ones((1, 2)), "x.lora_B.weight": np.ones((2, 1))}
    with pytest.raises(AggregationError, match="weights must be finite"):
        LoraAggregation(rule).average([pair, pair], [0.0, 0.0], pair)


def test_the_rules_of_the_settings_are_those_there_are() -> None:
    assert list(TUNED_PARTS) == list(get_args(setting_types()["federated.lora_aggregation"]))


def test_update_norm_is_euclidean_over_all_tensors() -> None:
    old = {"A": np.zeros((1, 2), np.float32), "B": np.ones(1, np.float32)}
    new = {"A": np.array([[2.0, 3.0]], np.float32), "B": np.array([7.0], np.float32)}
    assert update_norm(new, old) == 7.0  # sqrt(4 + 9 + 36)


def test_update_norm_does_not_depend_on_the_order_of_tensors() -> None:
    # A file gives its tensors back in any order; added one by one, these have three sums.
    rng = np.random.default_rng(0)
    one = {name: rng.normal(size=3) for name in "abcdef"}
    zero = {name: np.zeros(3) for name in one}
    orders = itertools.permutations(one)
    assert len({update_norm(one, {name: zero[name] for name in order}) for order in orders}) == 1


def test_update_norm_of_large_float32_values_does_not_overflow() -> None:
    assert update_norm(state(3e30, 4e30), state(0.0, 0.0)) == pytest.approx(5e30)


# --- server optimisers --------------------------------------------------------------------------


def test_fedavg_with_server_learning_rate_one_returns_the_average_itself() -> None:
    rng = np.random.default_rng(0)
    current = {"w": (1e10 * rng.normal(size=1000)).astype(np.float32)}
    average = {"w": (1e-10 * rng.normal(size=1000)).astype(np.float32)}  # lost in a difference
    new, moments = ServerOptimizer("fedavg", 1.0).step(current, average, {})
    assert new["w"].tobytes() == average["w"].tobytes()
    assert moments == {}


def test_fedavg_with_half_the_learning_rate_goes_half_the_way() -> None:
    new, _ = ServerOptimizer("fedavg", 0.5).step(state(1.0, 2.0), state(3.0, -2.0), {})
    assert new["w"].tolist() == [2.0, 0.0]


def test_fedavgm_matches_two_steps_by_hand() -> None:
    # m1 = 4, x1 = 0 + 4/2 = 2;  delta2 = 4 - 2 = 2, m2 = 4/2 + 2 = 4, x2 = 2 + 4/2 = 4
    opt = ServerOptimizer("fedavgm", learning_rate=0.5, momentum=0.5)
    assert two_steps(opt, [4.0], [4.0]) == [[2.0], [4.0]]


def test_fedadam_matches_two_steps_by_hand() -> None:
    # Reddi et al. (2021), algorithm 2, with eta 2, beta_1 = beta_2 = 1/2, tau 2, so v0 = tau^2 = 4:
    # delta1 = 2:   m1 = 1,   v1 = 4/2 + 4/2 = 4,       x1 = 2 * 1 / (2 + 2) = 1/2
    # delta2 = 14:  m2 = 15/2, v2 = 4/2 + 196/2 = 100,  x2 = 1/2 + 2 * (15/2) / (10 + 2) = 7/4
    opt = ServerOptimizer("fedadam", learning_rate=2.0, momentum=0.5, beta2=0.5, tau=2.0)
    assert two_steps(opt, [2.0, -2.0], [14.5, -14.5]) == [[0.5, -0.5], [1.75, -1.75]]


def test_fedyogi_matches_two_steps_by_hand() -> None:
    # The same algorithm with eta 2.4, beta_1 = 1/2, beta_2 = 0.36, tau 2, so v0 = 4:
    # delta1 = 1.5 (2.25 < v0):    m1 = 0.75, v1 = 4 - 0.64 * 2.25 = 2.56 = 1.6^2,
    #                              x1 = 2.4 * 0.75 / (1.6 + 2) = 0.5
    # delta2 = 3.75 (14.06 > v1):  m2 = 2.25, v2 = 2.56 + 0.64 * 14.0625 = 11.56 = 3.4^2,
    #                              x2 = 0.5 + 2.4 * 2.25 / (3.4 + 2) = 1.5
    opt = ServerOptimizer("fedyogi", learning_rate=2.4, momentum=0.5, beta2=0.36, tau=2.0)
    first, second = two_steps(opt, [1.5, -1.5], [4.25, -4.25])
    np.testing.assert_allclose(first, [0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(second, [1.5, -1.5], rtol=1e-6)


@pytest.mark.parametrize("rule", ["fedadam", "fedyogi"])
def test_moments_are_per_tensor_and_in_float64(rule: str) -> None:
    current = {"A": np.zeros(2, np.float32), "B": np.zeros((3, 1), np.float32)}
    average = {"A": np.ones(2, np.float32), "B": np.full((3, 1), 2.0, np.float32)}
    new, moments = ServerOptimizer(rule).step(current, average, {})
    assert {n: (m.shape, m.dtype.name) for n, m in moments.items()} == {
        "m/A": ((2,), "float64"),
        "v/A": ((2,), "float64"),
        "m/B": ((3, 1), "float64"),
        "v/B": ((3, 1), "float64"),
    }
    assert {n: a.dtype for n, a in new.items()} == {"A": np.float32, "B": np.float32}


@pytest.mark.parametrize("rule", SERVER_OPTIMIZERS)
def test_a_tensor_that_was_not_averaged_stays_with_its_moments(rule: str) -> None:
    opt = ServerOptimizer(rule, 0.5)
    current = {"A": np.ones(2, np.float32), "B": np.zeros(2, np.float32)}
    one, first = opt.step(current, {"A": np.full(2, 3, np.float32)}, {})
    two, second = opt.step(one, {"B": np.full(2, 3, np.float32)}, first)
    assert one["A"].tolist() == two["A"].tolist() != [1.0, 1.0]
    assert one["B"].tolist() == [0.0, 0.0] != two["B"].tolist()
    assert {n for n in first if n.endswith("/B")} == set()
    assert all(second[name] is moment for name, moment in first.items())


@pytest.mark.parametrize("rule", SERVER_OPTIMIZERS)
def test_no_rule_changes_the_adapter_that_it_was_given(rule: str) -> None:
    current, average = state(1.0), state(2.0)
    ServerOptimizer(rule, 0.5).step(current, average, {})
    assert (current["w"].item(), average["w"].item()) == (1.0, 2.0)


@pytest.mark.parametrize("rule", SERVER_OPTIMIZERS)
def test_an_average_equal_to_the_adapter_moves_nothing(rule: str) -> None:
    new, _ = ServerOptimizer(rule).step(state(1.5, -3.0), state(1.5, -3.0), {})
    assert new["w"].tolist() == [1.5, -3.0]
