"""Kinds of devices and their mixes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeat.core.errors import WorldError
from fedpeat.mec.devices import KINDS, PRESETS, kinds_of


def test_a_mix_is_met_as_nearly_as_whole_devices_can() -> None:
    assert np.bincount(kinds_of(PRESETS["mixed"], 10)).tolist() == [3, 4, 2, 1]
    assert np.bincount(kinds_of({"iot": 1, "phone": 1, "laptop": 1}, 5)).tolist() == [2, 2, 1]
    assert kinds_of({"phone": 2, "laptop": 0}, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "mix", [{}, {"toaster": 1.0}, {"iot": -1.0, "phone": 2.0}, {"iot": 0.0}, {"iot": math.nan}]
)
def test_a_mix_that_cannot_be_is_refused(mix: dict[str, float]) -> None:
    with pytest.raises(WorldError, match="a mix must give shares of iot, phone, laptop, vehicular"):
        kinds_of(mix, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tx_power_w": -0.1}, r"tx_power_w of a device must be finite, rising and in \[0, inf\]"),
        ({"tx_power_w": math.nan}, "tx_power_w of a device must be finite"),
        ({"tx_power_w": 0.0}, "tx_power_w of a device must be above 0, got 0.0"),
        ({"clock_hz": (2e9, 1e9)}, "clock_hz of a device must be finite, rising"),
        ({"memory_bytes": (1.0, math.inf)}, "memory_bytes of a device must be finite, rising"),
        ({"leaves_ratio": 1.5}, r"leaves_ratio of a device must be finite, rising and in \[0, 1\]"),
        ({"utilisation_ratio": (0.0, 0.5)}, "utilisation_ratio of a device must be above 0, got"),
    ],
)
def test_constants_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        replace(KINDS["phone"], **changes)


def test_only_a_battery_may_be_infinite() -> None:
    assert replace(KINDS["phone"], battery_j=math.inf).battery_j == math.inf
