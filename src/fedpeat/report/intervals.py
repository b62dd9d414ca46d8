"""Mean and 95 % confidence interval over a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Estimate", "estimate", "t_quantile"]

# Quantile 0.975 of Student's t for 1, 2, ... 29 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
_T_975: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; half_width is None for fewer than two."""

    mean: float
    half_width: float | None
    num_values: int


def t_quantile(num_values: int) -> float:
    """Return the 0.975 quantile of Student's t for so many values, 2 or more.

    From 31 values on it stays at that of 30, which makes an interval wider by 4 % at most.
    """
    if num_values < 2:
        raise ValueError(f"num_values must be 2 or more, got {num_values}")
    return _T_975[min(num_values - 2, len(_T_975) - 1)]


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Return mean and half width of the 95 % interval, t * s / sqrt(n), over the values measured.

    Args:
        values: One per seed, None where not measured; one that is not finite makes the mean NaN.

    Returns:
        None if nothing was measured.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    num_values = len(known)
    if not all(math.isfinite(value) for value in known):
        return Estimate(math.nan, None, num_values)
    mean = math.fsum(known) / num_values
    if num_values == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (num_values - 1)
    return Estimate(mean, t_quantile(num_values) * math.sqrt(variance / num_values), num_values)
