"""What noise on subsampled sums promises: epsilon, by the Renyi accountant of Opacus.

The unit is what is in a sum or not, with the same chance in each step by itself (Poisson sampling),
and neighbours differ by one unit more or less. Renyi accounting gives an upper bound; that of
privacy loss distributions is lower by 10 to 20 % here (benchmarks/privacy.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from fedpeat.core.errors import ConfigError

__all__ = ["ORDERS", "epsilon_of", "noise_for", "require_accountant"]

ORDERS = (*(1 + i / 10 for i in range(1, 100)), *range(11, 64), 80, 128, 256, 512, 1024)
_MOST_NOISE = 1e4
_PRECISION = 1e-3


def require_accountant() -> None:
    """Check that the accountant is installed.

    Raises:
        ConfigError: If it is not.
    """
    try:
        import opacus  # noqa: F401, PLC0415 - takes seconds, and an extra
    except ImportError as error:
        raise ConfigError(
            'privacy.* needs an accountant: pip install "fedpeat[privacy]"'
        ) from error


@lru_cache(maxsize=4096)
def _renyi(noise_multiplier: float, rate: float) -> Float64[np.ndarray, " orders"]:
    """Return the Renyi divergence of one step, for each order.

    Source:
        Mironov, Talwar, Zhang (2019), Renyi differential privacy of the sampled Gaussian mechanism.
    """
    from opacus.accountants.analysis.rdp import (  # noqa: PLC0415 - takes seconds, and an extra
        compute_rdp,
    )

    found = compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS)
    return np.asarray(found, dtype=np.float64)


def epsilon_of(spent: Mapping[tuple[float, float], int], delta: float) -> float:
    """Return the epsilon of steps that were made.

    Args:
        spent: Number of steps by (noise multiplier, chance to be in a step).
        delta: Chance with which the promise may be broken.

    Source:
        Canonne, Kamath, Steinke (2020), The discrete Gaussian, proposition 12.
    """
    made = {key: steps for key, steps in spent.items() if steps}
    if not made:
        return 0.0
    from opacus.accountants.analysis.rdp import (  # noqa: PLC0415 - takes seconds, and an extra
        get_privacy_spent,
    )

    total = sum(steps * _renyi(*key) for key, steps in made.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a best order at the end, where the bound holds as well
        epsilon, _ = get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)
    return float(epsilon)


@lru_cache(maxsize=4096)
def noise_for(target_epsilon: float, rate: float, steps: int, delta: float) -> float:
    """Return the least noise multiplier, to a thousandth, with which steps stay within an epsilon.

    Raises:
        ConfigError: If there is none.
    """

    def fits(noise_multiplier: float) -> bool:
        return epsilon_of({(noise_multiplier, rate): steps}, delta) <= target_epsilon

    high = 1.0
    while not fits(high):
        high *= 2
        if high > _MOST_NOISE:
            raise ConfigError(
                f"privacy.*_target_epsilon must be within reach of noise, got {target_epsilon:g} "
                f"for {steps} steps"
            )
    low = high / 2 if high > 1 else 0.05
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
