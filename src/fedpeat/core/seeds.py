"""Random numbers that depend on the run's seed and their purpose, never on what was drawn before.

A stream is named, not continued: the batches of device 3 in round 7 are the same whether rounds 1-6
ran in this process, in another, or not at all. So a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["derive_seed", "generator"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, e.g. ``derive_seed(0, "batches", "client-3", 7)``."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))
