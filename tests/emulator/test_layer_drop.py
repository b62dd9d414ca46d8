"""Which blocks uniform layer drop keeps."""

from __future__ import annotations

import pytest

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.layer_drop import kept_blocks, uniform_layer_drop


@pytest.mark.parametrize(
    ("total", "keep_ratio", "expected"),
    [
        (8, 0.5, [0, 2, 5, 7]),  # round(i * 7 / 3), i = 0..3: 0, 2.33, 4.67, 7
        (8, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 0.25, [0, 7]),
        (8, 0.1, [3]),  # one block: the middle one
        (
            44,
            16 / 44,
            [0, 3, 6, 9, 11, 14, 17, 20, 23, 26, 29, 32, 34, 37, 40, 43],
        ),  # 2-16-2 of GPT2-XL's 48
        (1, 0.5, [0]),
    ],
)
def test_kept_indices_match_the_formula_worked_by_hand(
    total: int, keep_ratio: float, expected: list[int]
) -> None:
    assert uniform_layer_drop(range(total), keep_ratio) == expected


def test_never_keeps_more_than_the_ratio() -> None:
    for total in range(2, 50):
        for percent in range(100 // total + 1, 101):
            assert (
                len(uniform_layer_drop(range(total), percent / 100)) <= total * percent / 100 + 1e-9
            )


def test_tuned_blocks_are_always_kept() -> None:
    assert kept_blocks(12, tuned=[0, 1, 10, 11], keep_ratio=0.5) == [0, 1, 2, 4, 7, 9, 10, 11]


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.01, float("nan")])
def test_ratio_out_of_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(EmulatorError, match=r"keep_ratio must be in \(0, 1\]"):
        uniform_layer_drop(range(4), keep_ratio)


def test_nothing_to_compress_is_refused() -> None:
    with pytest.raises(EmulatorError, match="no blocks between the tuned ones"):
        kept_blocks(4, tuned=[0, 1, 2, 3], keep_ratio=0.5)
