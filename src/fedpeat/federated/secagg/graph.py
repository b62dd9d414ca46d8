"""Who shares masks and keys with whom in a round, and how many shares open a secret. No crypto.

In a small cohort everybody does with everybody (Bonawitz et al. 2017); in a large one, each with k
others in a random circle (Bell et al. 2020), so that cost grows with k and not with the cohort.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedpeat.core.errors import AggregationError

__all__ = ["enough_neighbours", "neighbourhoods", "threshold"]

_ROUNDING = 1e-9  # 0.6 of 5 is 3, not a little more
_LARGE = 100  # below, everybody costs little, and no server can choose whom a device hides among
_CORRUPT_RATIO = 0.2
_DROPOUT_RATIO = 0.2
_SECURITY_BITS = 40
_CORRECTNESS_BITS = 20


def threshold(ratio: float, size: int) -> int:
    """Return how many shares of a neighbourhood open a secret of one of its members."""
    return max(2, math.ceil(ratio * size - _ROUNDING))


def neighbourhoods(
    names: Sequence[str], num_neighbours: int, rng: np.random.Generator
) -> Mapping[str, tuple[str, ...]]:
    """Return for each device those that it shares with, itself included, in the order of names.

    Args:
        names: Devices.
        num_neighbours: Neighbours of each, an even number; all others if there are no more.
        rng: Draws the circle.

    Source:
        Bell et al. (2020), Secure single-server aggregation with (poly)logarithmic overhead,
        section 3.1: a random permutation of the Harary graph.
    """
    if num_neighbours >= len(names) - 1:
        everyone = tuple(sorted(names))
        return dict.fromkeys(everyone, everyone)
    if num_neighbours < 2 or num_neighbours % 2:
        raise AggregationError(
            f"neighbours must be an even number, at least 2, got {num_neighbours}"
        )
    circle = [sorted(names)[i] for i in rng.permutation(len(names))]
    reach = range(-(num_neighbours // 2), num_neighbours // 2 + 1)
    near = {
        name: tuple(sorted(circle[(place + step) % len(circle)] for step in reach))
        for place, name in enumerate(circle)
    }
    return {name: near[name] for name in sorted(names)}


def enough_neighbours(cohort_size: int, ratio: float) -> int:
    """Return the least even number of neighbours with which a large cohort is safe; else all.

    With a fifth of the cohort corrupt and another fifth dropping out: the chance that anybody has
    as many corrupt neighbours as open a secret, or that the honest who are left fall apart, is at
    most 2^-40 each; the chance that anybody's secrets cannot be opened, at most 2^-20.

    Args:
        cohort_size: Devices of a round.
        ratio: Share of a neighbourhood that opens a secret.

    Source:
        Bell et al. (2020), section 3.2, definition 3.4 and theorem 3.10, with the tails computed.
    """
    others = cohort_size - 1
    corrupt, left = round(_CORRUPT_RATIO * others), others - round(_DROPOUT_RATIO * others)
    for k in range(2, others, 2) if cohort_size > _LARGE else ():
        needed = threshold(ratio, k + 1)
        opened = _at_least(needed, others, corrupt, k)
        apart = (_CORRUPT_RATIO + _DROPOUT_RATIO) ** k
        short = 1 - _at_least(needed - 1, others, left, k)  # its own share counts
        if (
            max(opened, apart) * cohort_size <= 2.0**-_SECURITY_BITS
            and short * cohort_size <= 2.0**-_CORRECTNESS_BITS
        ):
            return k
    return others


def _at_least(count: int, population: int, marked: int, draws: int) -> float:
    """Return the chance that at least so many of some draws without replacement are marked."""
    hits = range(max(0, count), min(marked, draws) + 1)
    ways = sum(math.comb(marked, h) * math.comb(population - marked, draws - h) for h in hits)
    return ways / math.comb(population, draws)
