"""What a federation asks of devices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeat.core.errors import WorldError
from fedpeat.mec.workload import WorkloadProfile
from worlds import rung, workload


def test_only_the_parts_that_a_device_lacks_are_exchanged() -> None:
    wanted = [
        [0, 0, 0],  # who has the large one has all
        [1e6, 0, 0],
        [3e6, 2e6, 0],
        [6e6, 5e6, 3e6],  # who has none
    ]
    np.testing.assert_array_equal(workload().exchange_bytes, wanted)


def test_an_attribute_of_all_rungs() -> None:
    np.testing.assert_array_equal(workload().of("memory_bytes"), [6e8, 4e8, 2e8])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adapter_down_bytes", -1),
        ("adapter_up_bytes", -1),
        ("parts", {"common": -1}),
        *(
            (name, value)
            for name in ("step_flops", "memory_bytes")
            for value in (-1.0, math.nan, math.inf)
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, value: Any) -> None:
    message = rf"rung small: {name}(\[common\])? must be finite, 0 or more, got (-1|nan|inf)"
    with pytest.raises(WorldError, match=message):
        replace(rung("small", 1), **{name: value})


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_rungs_have_names_of_their_own(names: list[str]) -> None:
    with pytest.raises(WorldError, match="a workload must have rungs with names of their own, got"):
        WorkloadProfile([rung(name, 1) for name in names])


def test_work_of_the_server_is_finite() -> None:
    with pytest.raises(WorldError, match="realign_flops must be finite, 0 or more, got nan"):
        workload(realign_flops=math.nan)
