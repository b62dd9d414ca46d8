"""Epsilon: that of the closed forms of Renyi differential privacy, to a millionth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from fedpeat.core.errors import ConfigError
from fedpeat.federated.accounting import ORDERS, epsilon_of, noise_for

DELTA = 1e-5


def renyi_by_hand(order: float, noise: float, rate: float) -> float:
    """Return the Renyi divergence of a whole order by the binomial sum, of others by an integral.

    Source:
        Mironov, Talwar, Zhang (2019), section 3.3: of N(0, s^2) and the mixture
        (1 - q) N(0, s^2) + q N(1, s^2).
    """
    if rate == 1:
        return float(order / (2 * noise**2))
    if order == int(order):
        terms = [
            math.log(math.comb(int(order), k))
            + (order - k) * math.log1p(-rate)
            + k * math.log(rate)
            + (k * k - k) / (2 * noise**2)
            for k in range(int(order) + 1)
        ]
        return float(np.logaddexp.reduce(terms) / (order - 1))

    def integrand(x: float) -> float:
        ratio = (1 - rate) + rate * math.exp((2 * x - 1) / (2 * noise**2))
        return float(stats.norm.pdf(x, 0, noise) * ratio**order)

    found, _ = integrate.quad(integrand, -40 * noise, 40 * noise + order, limit=400, epsabs=0)
    return float(math.log(found) / (order - 1))


def epsilon_by_hand(
    parts: list[tuple[float, float, int]], orders: tuple[float, ...], delta: float
) -> float:
    """Return the least epsilon over some orders (Canonne, Kamath, Steinke 2020, prop. 12)."""
    return min(
        sum(steps * renyi_by_hand(order, noise, rate) for noise, rate, steps in parts)
        + math.log1p(-1 / order)
        - math.log(delta * order) / (order - 1)
        for order in orders
    )


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(1.0, 1.0, 1), (0.7, 1.0, 10), (5.0, 1.0, 40), (1.0, 0.02, 200), (0.8, 0.1, 80)],
)
def test_epsilon_is_that_of_the_closed_form(noise: float, rate: float, steps: int) -> None:
    orders = tuple(order for order in ORDERS if 1.5 < order < 30)
    want = epsilon_by_hand([(noise, rate, steps)], orders, DELTA)
    assert epsilon_of({(noise, rate): steps}, DELTA) == pytest.approx(want, abs=1e-6)


def test_the_gaussian_mechanism_once_by_hand() -> None:
    # order a: a / 2 + log(1 - 1/a) - log(a / 100000) / (a - 1), least at a = 5.1 of the orders
    assert epsilon_of({(1.0, 1.0): 1}, DELTA) == pytest.approx(4.7285071, abs=1e-6)


def test_steps_of_different_kinds_add_up() -> None:
    spent = {(1.0, 0.05): 30, (2.0, 1.0): 3}
    want = epsilon_by_hand([(1.0, 0.05, 30), (2.0, 1.0, 3)], tuple(range(2, 11)), DELTA)
    assert epsilon_of(spent, DELTA) == pytest.approx(want, abs=0.02)
    assert epsilon_of(spent, DELTA) > epsilon_of({(2.0, 1.0): 3}, DELTA)


def test_nothing_spent_is_0_and_no_noise_is_no_promise() -> None:
    assert epsilon_of({}, DELTA) == epsilon_of({(1.0, 0.1): 0}, DELTA) == 0
    assert epsilon_of({(0.0, 0.1): 1}, DELTA) == math.inf


@pytest.mark.parametrize(("target", "rate", "steps"), [(3.0, 0.05, 80), (8.0, 1.0, 10)])
def test_the_noise_for_an_epsilon_reaches_it_and_hardly_more(
    target: float, rate: float, steps: int
) -> None:
    noise = noise_for(target, rate, steps, DELTA)
    assert target * 0.99 < epsilon_of({(noise, rate): steps}, DELTA) <= target


def test_an_epsilon_that_no_noise_reaches_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="must be within reach of noise, got 1e-09 for 10 steps"):
        noise_for(1e-9, 1.0, 10, DELTA)
