"""Which blocks an emulator keeps: uniform layer drop."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeat.core.errors import EmulatorError

__all__ = ["kept_blocks", "uniform_layer_drop"]


def uniform_layer_drop(candidates: Sequence[int], keep_ratio: float) -> list[int]:
    """Return evenly spaced blocks, the first and the last among them.

    Args:
        candidates: Block indices to choose from, rising.
        keep_ratio: Share to keep, in (0, 1]; the number kept is rounded down, but never to none.

    Raises:
        EmulatorError: If the ratio is out of range or there is nothing to choose from.

    Source:
        Xiao, Lin, Han (2023), Offsite-Tuning, arXiv:2302.04870: index i of n is round(i (L - 1) /
        (n - 1)).
    """
    if not 0 < keep_ratio <= 1:
        raise EmulatorError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    if not candidates:
        raise EmulatorError(
            "there are no blocks between the tuned ones to compress; tune fewer blocks"
        )
    total = len(candidates)
    num_kept = max(1, int(keep_ratio * total + 1e-9))
    if num_kept == 1:
        return [candidates[(total - 1) // 2]]
    return [candidates[int(i * (total - 1) / (num_kept - 1) + 0.5)] for i in range(num_kept)]


def kept_blocks(num_blocks: int, tuned: Sequence[int], keep_ratio: float) -> list[int]:
    """Return all blocks of an emulator: the tuned ones, and a share of those that are not.

    Args:
        num_blocks: Blocks of the full model.
        tuned: Indices that are kept whatever the ratio.
        keep_ratio: Share of the others to keep, in (0, 1].

    Raises:
        EmulatorError: If the ratio is out of range, or compression is asked for and there is
            nothing to compress.
    """
    others = [i for i in range(num_blocks) if i not in set(tuned)]
    if keep_ratio == 1:
        return list(range(num_blocks))
    return sorted([*tuned, *uniform_layer_drop(others, keep_ratio)])
