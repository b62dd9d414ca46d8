"""Equal-finish shares against the optimum that a general solver finds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from fedpeat.mec.allocation import equal_finish_shares, finish_times_s

Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def drawn(num_worlds: int, num_devices: int, seed: int) -> Parts:
    """Return fixed, down, up and snr of rounds as different as they come."""
    rng = np.random.default_rng(seed)
    shape = (num_worlds, num_devices)
    fixed_s = rng.uniform(0, 30, shape) * (rng.random((num_worlds, 1)) < 0.8)
    return (
        fixed_s,
        10 ** rng.uniform(-3, 1, shape),
        10 ** rng.uniform(-3, 1, shape),
        10 ** rng.uniform(-2, 4, shape),
    )


def everyone(parts: Parts) -> np.ndarray:
    return np.ones(parts[0].shape, dtype=bool)


def test_finish_time_worked_by_hand() -> None:
    # half of the band: 2 s + 1 s / 0.5 + 3 bit/Hz / (0.5 * log2(1 + 1.5 / 0.5))
    numbers = (np.array([[x]]) for x in (0.5, 2.0, 1.0, 3.0, 1.5))
    assert finish_times_s(*numbers) == pytest.approx(2 + 2 + 3 / (0.5 * 2))


def test_everyone_is_done_at_the_same_time_with_the_whole_band_given_out() -> None:
    parts = drawn(500, 10, 0)
    shares = equal_finish_shares(*parts, everyone(parts))
    np.testing.assert_allclose(shares.sum(-1), 1)
    finish = finish_times_s(shares, *parts)
    np.testing.assert_allclose(finish.min(-1), finish.max(-1), rtol=1e-3)


def test_a_general_solver_finds_no_shorter_round() -> None:
    parts = drawn(20, 4, 1)
    ours = finish_times_s(equal_finish_shares(*parts, everyone(parts)), *parts).max(-1)
    for world, wanted in enumerate(ours):
        fixed_s, down_s, up_bits_per_hz, snr = (part[world] for part in parts)
        own = fixed_s, down_s, up_bits_per_hz, snr

        def slack(x: np.ndarray, own: Parts = own) -> np.ndarray:
            return np.asarray(x[-1] - finish_times_s(np.maximum(x[:-1], 1e-6), *own))

        start = np.append(np.full(4, 0.25), finish_times_s(np.full(4, 0.25), *own).max())
        found = minimize(
            lambda x: x[-1],
            start,
            method="SLSQP",
            bounds=[(1e-6, 1)] * 4 + [(0, None)],
            constraints=[
                {"type": "ineq", "fun": slack},
                {"type": "ineq", "fun": lambda x: 1 - x[:-1].sum()},
            ],
            options={"maxiter": 500, "ftol": 1e-10},
        )
        assert wanted <= found.fun * (1 + 1e-3)
        assert found.fun <= wanted * (1 + 1e-2)  # so that the two agree


def test_those_who_take_no_part_get_nothing() -> None:
    parts = drawn(50, 6, 2)
    active = np.random.default_rng(3).random((50, 6)) < 0.5
    active[0] = False
    shares = equal_finish_shares(*parts, active)
    assert (shares[~active] == 0).all()
    np.testing.assert_allclose(shares.sum(-1), active.any(-1))
    alone = active.sum(-1) == 1
    np.testing.assert_allclose(shares[alone].max(-1), 1)


def test_a_device_with_nothing_to_send_gets_nothing() -> None:
    parts = drawn(1, 3, 4)
    for part in parts[1:3]:
        part[0, 1] = 0
    shares = equal_finish_shares(*parts, everyone(parts))[0]
    assert shares[1] == 0
    assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("num_devices", [1, 2, 10, 500])
def test_rounds_of_hard_numbers_are_solved_to_the_last_digits(num_devices: int) -> None:
    rng = np.random.default_rng(num_devices)
    shape = (5000 // num_devices, num_devices)
    fixed_s, down_s, up_bits_per_hz = 10 ** rng.uniform(-3, 2, (3, *shape))
    snr = 10 ** rng.uniform(-3, 6, shape)
    fixed_s[rng.random(shape) < 0.2] = 0
    only = rng.integers(4, size=shape)
    down_s[only == 0] = 0
    up_bits_per_hz[only == 1] = 0
    active = rng.random(shape) < rng.random((shape[0], 1))
    active[0] = True
    parts = fixed_s, down_s, up_bits_per_hz, snr
    shares = equal_finish_shares(*parts, active)
    assert ((shares > 0) == active).all()
    np.testing.assert_allclose(shares.sum(-1), active.any(-1))
    # that all are done at once with the whole band given out makes it the optimum
    finish = np.where(active, finish_times_s(np.where(active, shares, 1), *parts), np.nan)
    some = finish[active.any(-1)]
    np.testing.assert_allclose(np.nanmin(some, -1), np.nanmax(some, -1), rtol=1e-9)


def test_a_late_start_does_not_hide_a_short_message() -> None:
    # the first needs 1e-12 s after 1e5 s and takes what is left: the second is done then with half
    parts = np.array([1e5, 0.0]), np.array([1e-12, 5e4]), np.zeros(2), np.ones(2)
    shares = equal_finish_shares(*parts, everyone(parts))
    np.testing.assert_allclose(shares, [0.5, 0.5])


def test_a_device_that_is_hardly_heard_leaves_others_what_they_need() -> None:
    # it sends for about 1e12 s whatever its share; the other has to be done by then
    snr = np.array([np.log(2) * 1e-20, 1.0])
    parts = np.zeros(2), np.array([0.0, 1.0]), np.array([1e-8, 0.0]), snr
    shares = equal_finish_shares(*parts, everyone(parts))
    assert finish_times_s(shares, *parts).max() == pytest.approx(1e12)
