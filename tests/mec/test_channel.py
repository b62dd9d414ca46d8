"""Path loss, rates, shadowing and fading against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import j0

from fedpeat.mec import channel
from fedpeat.mec.constants import NOISE_DENSITY_W_HZ, SHADOWING_DB, SPEED_OF_LIGHT_M_S

RNG = np.random.default_rng


def test_path_loss_worked_by_hand() -> None:
    loss_db = channel.path_loss_db(np.array([1000.0, 100.0, 10_000.0]))
    np.testing.assert_allclose(loss_db, [128.1, 90.5, 165.7])


def test_nobody_is_nearer_than_the_model_holds_for() -> None:
    near, bound = channel.path_loss_db(np.array([1.0, 35.0]))
    assert near == bound


def test_decibels_and_back() -> None:
    np.testing.assert_allclose(channel.linear(np.array([0.0, 3.0, -10.0])), [1, 1.99526, 0.1], 1e-5)
    np.testing.assert_allclose(channel.decibels(np.array([1.0, 100.0])), [0, 20])
    assert channel.decibels(0.0) == -np.inf


def test_thermal_noise_is_that_of_290_kelvin() -> None:
    assert pytest.approx(1.380649e-23 * 290, rel=0.01) == NOISE_DENSITY_W_HZ


def test_rate_worked_by_hand() -> None:
    rate_bps = channel.achievable_rate_bps(np.array([1.0, 15.0]), np.array([1e6, 2e6]))
    np.testing.assert_allclose(rate_bps, [1e6, 8e6])


def test_bessel_function_against_scipy() -> None:
    x = np.concatenate([np.linspace(0, 10, 1001), np.geomspace(10, 1e5, 1000)])
    np.testing.assert_allclose(channel.bessel_j0(x), j0(x), atol=1e-7)


def test_cosine_by_the_tangent_of_half_the_angle() -> None:
    angle = np.concatenate([np.linspace(-10, 10, 1001), np.geomspace(10, 1e5, 1000), [np.pi]])
    np.testing.assert_allclose(channel.cosine(angle), np.cos(angle), atol=1e-14)


def test_a_channel_at_rest_stays_and_one_that_moves_is_soon_another() -> None:
    at_rest, moved = channel.fading_correlation(np.array([0.0, 1.0]), 2e9, np.array([5.0, 5.0]))
    assert at_rest == pytest.approx(1)
    assert abs(moved) < 0.1
    first_zero_s = 2.404826 / (2 * np.pi * 2e9 / SPEED_OF_LIGHT_M_S)
    at_zero = channel.fading_correlation(np.array(1.0), 2e9, np.array(first_zero_s))
    assert at_zero == pytest.approx(0, abs=1e-6)


def test_shadowing_keeps_its_deviation_and_is_correlated_as_asked() -> None:
    correlation = float(channel.shadowing_correlation(np.array(50.0)))
    assert correlation == pytest.approx(np.exp(-1))
    before = RNG(0).standard_normal((200, 500)) * SHADOWING_DB
    after = channel.next_shadowing(before, np.array(correlation), SHADOWING_DB, RNG(1))
    assert after.std() == pytest.approx(SHADOWING_DB, rel=0.01)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] == pytest.approx(correlation, abs=0.01)


def test_rayleigh_power_stays_exponential_with_mean_1() -> None:
    amplitude = channel.fresh_fading((200, 500), RNG(0))
    assert (np.abs(amplitude) ** 2).mean() == pytest.approx(1, rel=0.01)
    for correlation in (0.9, -0.3):
        after = channel.next_fading(amplitude, np.full((200, 500), correlation), RNG(1))
        power = np.abs(after) ** 2
        assert power.mean() == pytest.approx(1, rel=0.01)
        assert (power > 1).mean() == pytest.approx(np.exp(-1), abs=0.01)
        found = (amplitude.conj() * after).real.mean()
        assert found == pytest.approx(correlation, abs=0.01)
