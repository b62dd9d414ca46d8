"""Updates as whole numbers modulo 256^B, in which masks cancel exactly. NumPy only.

A change of the adapter is clipped to [-C, C], rounded to steps of C / 2^(b-1) and multiplied by the
device's number of examples, a whole number; so the only error is that of the rounding, and in the
average of any devices it is at most half a step. The ring is as small as holds the sum of a full
cohort whose every value is as large as it can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, UInt8, UInt64

from fedpeat.core.errors import AggregationError, WireError

__all__ = ["MAX_RING_BYTES", "Quantiser", "Ring"]

MAX_RING_BYTES = 8
_LEAST_BYTES = 4  # room for the counts and losses that travel along


@dataclass(frozen=True)
class Ring:
    """Whole numbers modulo 256^num_bytes; in memory modulo 2^64, which that divides."""

    num_bytes: int

    def packed(self, values: UInt64[np.ndarray, " values"]) -> UInt8[np.ndarray, " bytes"]:
        """Return numbers as the bytes that travel: the low ones of each, the lowest first."""
        wide = values.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
        return np.ascontiguousarray(wide[:, : self.num_bytes]).reshape(-1)

    def unpacked(self, packed: UInt8[np.ndarray, " bytes"]) -> UInt64[np.ndarray, " values"]:
        """Return the numbers that ``packed`` made bytes of."""
        wide = np.zeros((len(packed) // self.num_bytes, 8), np.uint8)
        wide[:, : self.num_bytes] = packed.reshape(-1, self.num_bytes)
        return wide.view("<u8").reshape(-1)

    def signed(self, values: UInt64[np.ndarray, " values"]) -> Int64[np.ndarray, " values"]:
        """Return numbers as those nearest to 0 that they are equal to in the ring."""
        unused = np.uint64(8 * (8 - self.num_bytes))
        return (values << unused).view(np.int64) >> unused.astype(np.int64)


@dataclass(frozen=True)
class Quantiser:
    """How values become whole numbers.

    Attributes:
        clip_range: C: values beyond [-C, C] are taken for its ends.
        num_bits: b: bits of a value.
        max_examples: Most examples that a device may weigh.
        cohort_size: Most devices in a sum.
    """

    clip_range: float
    num_bits: int
    max_examples: int
    cohort_size: int

    @property
    def step(self) -> float:
        """Distance of two values that can be told apart."""
        return self.clip_range * 2.0 ** (1 - self.num_bits)

    @property
    def ring(self) -> Ring:
        """The ring that holds every sum.

        Raises:
            AggregationError: If none does.
        """
        largest = 2 ** (self.num_bits - 1) * self.max_examples * self.cohort_size
        num_bytes = max(_LEAST_BYTES, math.ceil((largest.bit_length() + 1) / 8))
        if num_bytes > MAX_RING_BYTES:
            raise AggregationError(
                f"{self.num_bits} bits a value, {self.max_examples} examples a device and "
                f"{self.cohort_size} devices must fit into {8 * MAX_RING_BYTES} bits together, got "
                f"{largest.bit_length() + 1}; lower federated.max_examples_per_client or "
                "federated.secure_bits"
            )
        return Ring(num_bytes)

    @property
    def limit(self) -> int:
        """Largest whole number that a device may put into one place of the vector."""
        return int((256**self.ring.num_bytes // 2 - 1) // self.cohort_size)

    def weighted(
        self, change: Float[np.ndarray, " values"], num_examples: int
    ) -> tuple[Int64[np.ndarray, " values"], int]:
        """Return a change of the adapter, times a number of examples, and how much was clipped.

        Raises:
            WireError: If a value is not finite, or there are no examples or too many.
        """
        if not 0 < num_examples <= self.max_examples:
            raise WireError(f"examples must be in [1, {self.max_examples}], got {num_examples}")
        if not np.isfinite(change).all():
            raise WireError("the update has values that are not finite")
        clipped = np.clip(change, -self.clip_range, self.clip_range)
        num_clipped = int(np.count_nonzero(clipped != change))
        return np.rint(clipped / self.step).astype(np.int64) * num_examples, num_clipped

    def mean(
        self, sums: Int64[np.ndarray, " values"], num_examples: int
    ) -> Float[np.ndarray, " values"]:
        """Return the mean change over so many examples."""
        return sums.astype(np.float64) * (self.step / num_examples)
