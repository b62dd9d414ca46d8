"""Noise that nobody can foretell who does not have the key; the same again for who has it.

A seed is for what must be repeatable, and anybody may know it. Noise that hides something must not
be had from a seed: who knows the noise takes it off. So it comes from a secret key, and like seeds
(``core/seeds.py``) from a purpose: a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

__all__ = ["NoiseSource"]

_KEY_BYTES = 32
_MANTISSA_BITS = 53


@dataclass(frozen=True)
class NoiseSource:
    """Random numbers that depend on a secret key and their purpose.

    The stream of a purpose is SHAKE-256 of a key of its own, HMAC-SHA-256 of the purpose.

    Attributes:
        key: The secret, at least 16 bytes.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        assert len(self.key) >= _KEY_BYTES // 2, "a key that cannot be guessed"

    @classmethod
    def fresh(cls) -> NoiseSource:
        """Return a source that nobody has."""
        return cls(os.urandom(_KEY_BYTES))

    @classmethod
    def of_seed(cls, seed: int) -> NoiseSource:
        """Return the source of a seed, for experiments: who knows the seed knows the noise."""
        return cls(hashlib.sha256(f"fedpeat noise of seed {seed}".encode()).digest())

    def child(self, *purpose: str | int) -> NoiseSource:
        """Return a source for one purpose, which tells nothing of this one or of any other."""
        text = json.dumps(purpose).encode()
        return NoiseSource(hmac.digest(self.key, text, "sha256"))

    def seed(self, *purpose: str | int) -> int:
        """Return a 63-bit seed for draws that are to stay secret."""
        return int.from_bytes(self.child(*purpose).key[:8], "big") >> 1

    def uniform(self, count: int, *purpose: str | int) -> Float64[np.ndarray, " count"]:
        """Return numbers from (0, 1], all of which have 53 random bits."""
        stream = hashlib.shake_256(self.child(*purpose).key).digest(8 * count)
        bits = np.frombuffer(stream, np.uint64) >> np.uint64(64 - _MANTISSA_BITS)
        numbers: np.ndarray = (bits.astype(np.float64) + 1) * 2.0**-_MANTISSA_BITS
        return numbers

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Float64[np.ndarray, "*shape"]:
        """Return numbers of mean 0 and variance 1, drawn in double precision.

        Source:
            Box, Muller (1958), A note on the generation of random normal deviates.
        """
        size = math.prod(shape)
        half = (size + 1) // 2
        u = self.uniform(2 * half, *purpose)
        radius, angle = np.sqrt(-2 * np.log(u[:half])), 2 * np.pi * u[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].reshape(
            shape
        )
