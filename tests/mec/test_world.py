"""What a round costs in a cell, against formulas with units, and how the world goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeat.core.errors import WorldError
from fedpeat.mec.constants import BASE_STATION_POWER_W, NOISE_DENSITY_W_HZ
from fedpeat.mec.devices import KINDS, PRESETS
from fedpeat.mec.world import NONE_HELD, EdgeWorld, WorldSettings
from worlds import demand, rung, workload, world

LOAD = rung("small", 1)
RELIABLE: dict[str, Any] = {"preset": "laptop"}


def test_time_and_energy_of_a_device_are_those_of_the_formulas() -> None:
    there = world(num_worlds=1, preset="phone", num_devices=3, up_bandwidth_hz=10e6)
    share = np.array([[0.5, 0.3, 0.2]])
    kind, clock_hz = KINDS["phone"], there.clock_hz
    down_s = (
        8 * (LOAD.adapter_down_bytes + 3_000_000) / (share * 20e6 * np.log2(1 + there.snr_down))
    )
    up_s = 8 * LOAD.adapter_up_bytes / (share * 10e6 * np.log2(1 + there.snr_up / share))
    compute_s = 4 * LOAD.step_flops / there.flops_per_s
    cost = there.run_round(demand(there, share=share))
    np.testing.assert_allclose(cost.device_s, down_s + compute_s + up_s)
    assert cost.seconds == pytest.approx(cost.device_s.max())
    radio_j = kind.tx_power_w * up_s + kind.rx_power_w * down_s
    np.testing.assert_allclose(cost.device_j, radio_j + kind.capacitance * clock_hz**3 * compute_s)
    assert (cost.bytes_down == LOAD.adapter_down_bytes + 3_000_000).all()
    assert (cost.bytes_up == LOAD.adapter_up_bytes).all()


def test_a_signal_weakens_with_distance_as_the_path_loss_says() -> None:
    there = world(num_worlds=20_000, preset="laptop", num_devices=1)
    power_db = 10 * math.log10(BASE_STATION_POWER_W / (NOISE_DENSITY_W_HZ * 20e6))
    loss_db = 128.1 + 37.6 * np.log10(np.maximum(there.distance_m, 35) / 1e3)
    over_db = 10 * np.log10(there.snr_down) - (power_db - loss_db)
    # shadowing has mean 0; ten times the logarithm of an exponential -10 gamma / ln 10 and 5.57 dB
    assert over_db.mean() == pytest.approx(-10 * np.euler_gamma / math.log(10), abs=0.2)
    assert over_db.std() == pytest.approx(math.hypot(8, 5.57), rel=0.02)


def test_devices_are_spread_evenly_over_the_cell() -> None:
    there = world(num_worlds=20_000, num_devices=1, preset="laptop", radius_m=400.0)
    assert there.distance_m.max() <= 400
    assert (there.distance_m < 200).mean() == pytest.approx(0.25, abs=0.01)


def test_the_server_works_beside_the_devices_and_aligns_before_them() -> None:
    there = world(num_worlds=2, **RELIABLE)
    there.workload = workload(realign_flops=5e14)
    long = np.array([0, 10**6])
    cost = there.run_round(demand(there, server_steps=long, realigns=np.array([True, False])))
    assert cost.seconds[0] == pytest.approx(10 + cost.device_s[0].max())
    assert cost.seconds[1] == pytest.approx(1e6 * 1e13 / 50e12)
    np.testing.assert_allclose(cost.server_j, [10 * 400, 2e5 * 400])


def test_an_emulator_is_sent_once_and_only_what_differs() -> None:
    there = world(num_worlds=1, seed=3, **RELIABLE)
    there.workload = workload(refresh_bytes={"large": 70, "medium": 50, "small": 30})
    assert (there.held == NONE_HELD).all()
    able = there.feasible[..., 0]
    aligned = np.array([True])  # which is no news to those who hold nothing yet
    first = there.run_round(demand(there, takes_part=able, realigns=aligned))
    assert set(first.bytes_down[able]) == {100_000 + 3_000_000}
    assert (there.held[able] == 2).all()
    assert (there.held[~able] == NONE_HELD).all()
    both = able & there.feasible[..., 0]
    up = there.run_round(demand(there, takes_part=both, rung=np.zeros((1, 10), dtype=int)))
    assert set(up.bytes_down[both]) == {300_000 + 3_000_000}
    again = both & there.feasible[..., 0]
    same = there.run_round(
        demand(
            there,
            takes_part=again,
            rung=np.zeros((1, 10), dtype=int),
            realigns=np.array([True]),
        )
    )
    assert set(same.bytes_down[again]) == {300_000 + 70}


def test_nobody_waits_longer_than_the_deadline_and_what_is_late_is_lost() -> None:
    there = world(num_worlds=200, deadline_s=5.0, **RELIABLE)
    cost = there.run_round(demand(there))
    late = cost.device_s > 5
    assert late.any()
    assert not cost.finished[late].any()
    assert cost.seconds.max() <= 5
    assert cost.finished[~late & (cost.device_s > 0)].mean() == pytest.approx(0.98, abs=0.02)


def test_no_choice_of_shares_is_faster_than_the_optimised_one() -> None:
    ours, theirs = world(num_worlds=300), world(num_worlds=300)
    optimal, equal = ours.run_round(demand(ours, share=None)), theirs.run_round(demand(theirs))
    assert (optimal.seconds <= equal.seconds * (1 + 1e-4)).all()
    assert optimal.seconds.mean() < 0.95 * equal.seconds.mean()


def test_a_rung_that_does_not_fit_or_a_device_that_is_away_is_refused() -> None:
    there = world(num_worlds=50, preset="iot")
    for _ in range(3):
        there.run_round(demand(there))
    away = ~there.present
    assert away.any()
    with pytest.raises(WorldError, match="a device is asked to tune on a rung that it cannot hold"):
        there.run_round(demand(there, takes_part=away))
    assert not there.feasible[away].any()
    narrow = there.free_memory_bytes[..., None] < [6e8, 4e8, 2e8]
    assert (there.feasible == ~narrow & there.present[..., None]).all()


def test_a_battery_runs_down_and_a_device_without_charge_is_asked_for_nothing() -> None:
    there = world(num_worlds=10, preset="phone")
    cost = there.run_round(demand(there, local_steps=np.full((10, 10), 10**6)))
    assert (cost.device_j > KINDS["phone"].battery_j).any()
    flat = there.battery_ratio == 0
    assert flat.any()
    assert not there.feasible[flat].any()
    assert (world(preset="laptop").battery_ratio == 1).all()


def test_devices_leave_and_return_as_often_as_their_kind_does() -> None:
    there = world(num_worlds=2000, preset="phone")
    for _ in range(10):
        there.run_round(demand(there, takes_part=np.zeros((2000, 10), dtype=bool)))
    kind = KINDS["phone"]
    staying = kind.returns_ratio / (kind.returns_ratio + kind.leaves_ratio)
    assert there.present.mean() == pytest.approx(staying, abs=0.01)


def test_what_moves_is_reached_differently_in_the_next_round_and_what_rests_alike() -> None:
    moved = {}
    for preset in ("vehicular", "laptop"):
        there = world(num_worlds=500, preset=preset)
        before = there.distance_m
        there.run_round(demand(there))
        moved[preset] = np.abs(there.distance_m - before).max()
    assert moved["laptop"] == 0
    assert moved["vehicular"] > 10


def test_a_device_goes_any_way_from_where_it_is() -> None:
    there = world(num_worlds=10_000, preset="phone", radius_m=5000.0)
    before = there.distance_m
    idle = demand(there, takes_part=np.zeros(before.shape, dtype=bool))
    cost = there.run_round(replace(idle, server_steps=np.full(10_000, 5000)))
    np.testing.assert_allclose(cost.seconds, 1000)
    inside = before < 5000 - 1000 * 2  # none of these can have left the cell
    outwards_m = (there.distance_m - before)[inside]
    assert 0.9 * 2000 < outwards_m.max() <= 2000
    assert 0.9 * 2000 < -outwards_m.min() <= 2000
    # speeds are uniform between 0.5 and 2 m/s, and steps at any angle add up in squares
    grown_m2 = (there.distance_m**2 - before**2)[inside].mean()
    assert grown_m2 == pytest.approx(1000**2 * (0.5**2 + 0.5 * 2 + 2**2) / 3, rel=0.05)
    assert there.distance_m.max() <= 5000


def test_what_is_feasible_follows_from_what_changes_between_rounds() -> None:
    there = world(num_worlds=50, still=True, preset="phone")
    able = there.feasible[..., -1]
    assert able.all()
    there.run_round(demand(there, local_steps=np.full((50, 10), 10**6)))
    assert (there.feasible[..., -1] == (there.battery_ratio > 0)).all()
    assert not there.feasible.all()


def test_fading_changes_for_all_and_shadows_for_those_who_move() -> None:
    deviation_db = {}
    for preset in ("vehicular", "laptop"):
        there = world(num_worlds=2000, preset=preset)
        seen_db = []
        for _ in range(2):
            loss_db = 37.6 * np.log10(np.maximum(there.distance_m, 35))
            seen_db.append(10 * np.log10(there.snr_up) + loss_db)
            there.run_round(demand(there, server_steps=np.full(2000, 500)))  # 100 s
        deviation_db[preset] = (seen_db[1] - seen_db[0]).std()
    fading_db = 2**0.5 * 5.57
    assert deviation_db["laptop"] == pytest.approx(fading_db, rel=0.05)
    assert deviation_db["vehicular"] == pytest.approx(math.hypot(fading_db, 2**0.5 * 8), rel=0.05)


def test_what_a_device_can_spare_changes_from_round_to_round() -> None:
    there = world(num_worlds=500, preset="phone")
    flops, memory_bytes = there.flops_per_s, there.free_memory_bytes
    there.run_round(demand(there))
    for before, now in ((flops, there.flops_per_s), (memory_bytes, there.free_memory_bytes)):
        ratio = now / before  # of two uniform draws, from 0.1 to 0.3 and from 0.2 to 0.5
        assert ratio.min() < 0.5
        assert ratio.max() > 2


def test_the_same_seed_gives_the_same_world_and_another_gives_another() -> None:
    costs = []
    for seed in (0, 0, 1):
        there = world(seed=seed)
        for _ in range(3):
            cost = there.run_round(demand(there))
        costs.append(cost.seconds)
    assert (costs[0] == costs[1]).all()
    assert (costs[0] != costs[2]).all()


def test_a_world_that_begins_anew_leaves_the_others_alone() -> None:
    there = world(num_worlds=3)
    there.run_round(demand(there))
    clock_hz, held = there.clock_hz.copy(), there.held.copy()
    there.reset(np.array([False, True, False]))
    assert (there.clock_hz[[0, 2]] == clock_hz[[0, 2]]).all()
    assert (there.held[[0, 2]] == held[[0, 2]]).all()
    assert (there.clock_hz[1] != clock_hz[1]).all()
    assert (there.held[1] == NONE_HELD).all()


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_goes_on_for_long_with_finite_costs(preset: str) -> None:
    there = world(num_worlds=20, preset=preset)
    for _ in range(30):
        cost = there.run_round(demand(there, share=None))
        for number in (cost.seconds, cost.device_j, cost.bytes_down, there.snr_up):
            assert np.isfinite(number).all()
            assert (number >= 0).all()


def test_a_world_in_which_nothing_fits_is_refused() -> None:
    heavy = workload()
    heavy = type(heavy)([rung("huge", 1, memory_bytes=1e12)])
    message = "no device of a mixed world can hold any rung: the smallest takes 1e\\+12 bytes"
    with pytest.raises(WorldError, match=message):
        EdgeWorld(WorldSettings(), heavy, 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "office"}, "preset of a world must be one of iot, phone, .* got 'office'"),
        ({"num_devices": 0}, "num_devices of a world must be at least 1, got 0"),
        ({"up_bandwidth_hz": 0.0}, "up_bandwidth_hz of a world must be finite and above 0"),
        ({"down_bandwidth_hz": math.nan}, "down_bandwidth_hz of a world must be finite and above"),
        ({"deadline_s": -1.0}, "deadline_s of a world must be finite and above 0, got -1.0"),
        ({"radius_m": 20.0}, "radius_m of a world must be finite and above 35, got 20.0"),
        ({"server_power_w": math.inf}, "server_power_w of a world must be finite and above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        WorldSettings(**changes)
