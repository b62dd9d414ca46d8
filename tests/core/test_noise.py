"""Noise from a key: standard normal, secret, and the same again."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy import stats

from fedpeat.core.noise import NoiseSource

SOURCE = NoiseSource(bytes(range(32)))


def test_the_same_key_and_purpose_give_the_same_noise_and_any_other_another() -> None:
    again = NoiseSource(bytes(range(32))).normal((3, 4), "sum", 1, "a")
    assert again.tobytes() == SOURCE.normal((3, 4), "sum", 1, "a").tobytes()
    others = [
        SOURCE.normal((3, 4), "sum", 2, "a"),
        SOURCE.normal((3, 4), "sum", 1, "b"),
        SOURCE.normal((3, 4), "sum", "1", "a"),
        SOURCE.normal((3, 4), "su", "m", 1, "a"),
        SOURCE.child("sum").normal((3, 4), 1, "a"),
        NoiseSource(bytes(32)).normal((3, 4), "sum", 1, "a"),
    ]
    assert all(not np.isin(other, again).any() for other in others)


def test_noise_is_standard_normal() -> None:
    drawn = SOURCE.normal((200_000,), "test")
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    assert drawn.std() == pytest.approx(1, abs=0.01)
    halves = drawn.reshape(2, -1)  # the cosines and the sines of one draw each
    assert abs(np.corrcoef(halves)[0, 1]) < 0.02
    assert abs(np.corrcoef(halves**2)[0, 1]) < 0.02


def test_an_odd_number_of_draws_has_its_shape() -> None:
    assert SOURCE.normal((3, 5), "test").shape == (3, 5)
    assert SOURCE.normal((), "test").shape == ()


def test_chances_are_uniform_and_never_0() -> None:
    drawn = SOURCE.uniform(100_000, "test")
    assert stats.kstest(drawn, "uniform").pvalue > 0.01
    assert drawn.min() > 0
    assert drawn.max() <= 1


def test_the_stream_is_shake_256_of_an_hmac_of_the_purpose() -> None:
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in SOURCE.key.ljust(64, b"\0")) + b'["a", 1]')
    outer = hashlib.sha256(bytes(b ^ 0x5C for b in SOURCE.key.ljust(64, b"\0")) + inner.digest())
    stream = hashlib.shake_256(outer.digest()).digest(8)
    want = ((int.from_bytes(stream, "little") >> 11) + 1) / 2**53
    assert SOURCE.uniform(1, "a", 1)[0] == want


def test_a_fresh_source_is_nobody_elses_and_a_key_is_not_shown() -> None:
    assert NoiseSource.fresh().key != NoiseSource.fresh().key
    assert "key" not in repr(SOURCE)


def test_the_source_of_a_seed_is_that_of_the_seed() -> None:
    assert NoiseSource.of_seed(3) == NoiseSource.of_seed(3) != NoiseSource.of_seed(4)
