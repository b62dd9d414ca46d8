"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from fedpeat.report.quantities import (
    bytes_text,
    contrast_texts,
    count_text,
    number_text,
    quality_text,
    ratio_text,
    seconds_text,
    seed_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21.3449, "21.34"),
        (9.99996, "10.00"),
        (12345.6, "12,346"),
        (0.00012, "0.0001200"),
        (0.0, "0"),
        (-3.5, "-3.500"),
        (1.25e12, "1.250e12"),
        (4.2e-7, "4.200e-7"),
        (None, "not measured"),
        (math.nan, "not finite"),
        (-math.inf, "not finite"),
    ],
)
def test_a_number_keeps_four_digits(value: float | None, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (999_999, "1.0 MB"),
        (812e6, "812 MB"),
        (3.4e18, "3,400 PB"),
        (math.nan, "not finite"),
    ],
)
def test_bytes_come_in_decimal_units(value: float, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.045, "45 ms"),
        (8.13, "8.1 s"),
        (59.97, "1 min"),
        (192, "3 min 12 s"),
        (7500, "2 h 5 min"),
        (86400 * 3 + 3600 * 4, "3 d 4 h"),
        (None, "not measured"),
    ],
)
def test_a_duration_comes_in_its_two_largest_units(value: float | None, text: str) -> None:
    assert seconds_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.8063, "81 %"), (0.012, "1.2 %"), (0.00042, "0.042 %"), (1.18, "118 %")]
)
def test_a_ratio_becomes_a_percentage(value: float, text: str) -> None:
    assert ratio_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(98_304, "98,304"), (8_212_480, "8.2 M"), (1.3e9, "1.3 B"), (None, "not measured")],
)
def test_a_large_count_is_scaled(value: float | None, text: str) -> None:
    assert count_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (0, "0"), (1_234_567, "1234567"), (None, "not measured")]
)
def test_a_seed_keeps_every_digit(value: float | None, text: str) -> None:
    assert seed_text(value) == text


def test_accuracy_is_a_percentage() -> None:
    assert quality_text(0.782, "accuracy") == "78.20 %"


def test_close_qualities_get_the_digits_that_tell_them_apart() -> None:
    assert contrast_texts(34.86, 34.91, "perplexity") == ("34.86", "34.91")
    assert contrast_texts(21.34, 34.9, "perplexity") == ("21.3", "34.9")
