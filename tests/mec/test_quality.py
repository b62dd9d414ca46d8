"""The curves that a loss follows, against numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeat.core.errors import WorldError
from fedpeat.mec.quality import QualityModel, RoundWork, effective_number, recent_shares
from worlds import quality

FIRST = np.array([0])


def work(**changes: Any) -> RoundWork:
    """Return one world's: four equal devices, half on the large rung, and no server."""
    numbers: dict[str, Any] = {
        "rung_share": [0.5, 0.0, 0.5],
        "num_effective": 4.0,
        "local_steps": 9.0,
        "server_share": 0.0,
        "server_steps": 0.0,
        "staleness": 0.0,
        "num_recent": math.inf,
    }
    return RoundWork(**{name: np.array([value]) for name, value in (numbers | changes).items()})


def test_a_round_of_devices_worked_by_hand() -> None:
    after = quality().next_loss(np.array([3.0]), work(), FIRST)
    progress = 4**0.5 * (0.5 * 0.05 + 0.5 * 0.02) * 9**0.5
    floor = 2.0 + 0.5 * 0.1
    assert after == pytest.approx(floor + math.exp(-progress) * (3.0 - floor))


def test_a_round_of_the_server_worked_by_hand() -> None:
    alone = work(rung_share=[0.0, 0.0, 0.0], num_effective=0.0, server_share=1.0, server_steps=16.0)
    after = quality().next_loss(np.array([3.0]), alone, FIRST)
    assert after == pytest.approx(2.0 + math.exp(-0.04 * 4))


def test_the_server_dilutes_what_the_devices_do() -> None:
    after = quality().next_loss(np.array([3.0]), work(server_share=0.25, server_steps=4.0), FIRST)
    progress = 0.75 * 4**0.5 * 0.035 * 3 + 0.25 * 0.04 * 2
    floor = 2.0 + 0.75 * 0.05
    assert after == pytest.approx(floor + math.exp(-progress) * (3.0 - floor))


def test_stale_emulators_are_slower() -> None:
    after = quality().next_loss(np.array([3.0]), work(staleness=10.0), FIRST)
    progress = 2 * 0.035 * 3 * math.exp(-0.02 * 10)
    assert after == pytest.approx(2.05 + math.exp(-progress) * 0.95)


def test_what_follows_one_device_settles_higher_than_what_follows_many() -> None:
    after = [
        quality().next_loss(np.array([3.0]), work(num_recent=number), FIRST).item()
        for number in (0.0, 1.0, 5.0)
    ]
    pull = 1 - math.exp(-2 * 0.035 * 3)
    assert after[:2] == [pytest.approx(3 - pull * (3 - 2.05 - 0.05))] * 2
    assert after[2] == pytest.approx(3 - pull * (3 - 2.05 - 0.05 / 5))


def test_devices_of_late_worked_by_hand() -> None:
    recent = np.array([[1.0, 0.0, 0.0], [0.2, 0.4, 0.0]])
    weights = np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    shares = recent_shares(recent, weights)
    np.testing.assert_allclose(shares, [[0.7 + 0.25, 0.75, 0.0], [0.2, 0.4, 0.0]])
    numbers = effective_number(np.array([[2.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(numbers, [2.0, 1.6, 0.0])


def test_a_round_in_which_nobody_did_anything_changes_nothing() -> None:
    idle = work(rung_share=[0.0, 0.0, 0.0], num_effective=0.0, local_steps=0.0)
    assert quality().next_loss(np.array([2.7]), idle, FIRST) == 2.7


def test_each_world_follows_its_own_member() -> None:
    two = replace(
        quality(),
        **{n: np.repeat(v, 2, axis=0) for n, v in vars(quality()).items() if n != "floor"},
        floor=np.array([2.0, 2.5]),
    )
    same = work()
    both = RoundWork(**{name: np.repeat(value, 2, axis=0) for name, value in vars(same).items()})
    low, high = two.next_loss(np.array([3.0, 3.0]), both, np.array([0, 1]))
    assert (two.num_members, low < high) == (2, True)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_constants_that_cannot_be_are_refused(value: float) -> None:
    with pytest.raises(WorldError, match="excess of a quality model must be finite, 0 or more"):
        replace(quality(), excess=np.full((1, 3), value))


def test_only_a_floor_may_be_negative() -> None:
    assert replace(quality(), floor=np.array([-1.0])).floor == [-1]
    with pytest.raises(WorldError, match="floor of a quality model must be finite"):
        replace(quality(), floor=np.array([math.nan]))
    assert isinstance(quality(), QualityModel)
