"""Which blocks uniform layer drop keeps."""

from __future__ import annotations

import pytest

from fedpeat.emulator.layer_drop import uniform_layer_drop


@pytest.mark.parametrize(
    ("total", "num_kept", "expected"),
    [
        (8, 4, [0, 2, 5, 7]),  # round(i * 7 / 3), i = 0..3: 0, 2.33, 4.67, 7
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 2, [0, 7]),
        (8, 1, [3]),  # one block: the middle one
        (
            44,
            16,
            [0, 3, 6, 9, 11, 14, 17, 20, 23, 26, 29, 32, 34, 37, 40, 43],
        ),  # 2-16-2 of GPT2-XL's 48
        (1, 1, [0]),
    ],
)
def test_kept_indices_match_the_formula_worked_by_hand(
    total: int, num_kept: int, expected: list[int]
) -> None:
    assert uniform_layer_drop(range(total), num_kept) == expected
