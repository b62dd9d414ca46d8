"""Which blocks of the full model are tuned."""

from __future__ import annotations

from fedpeat.core.errors import SplitError

__all__ = ["tuned_blocks"]


def tuned_blocks(placement: str, num_blocks: int, num_bottom: int, num_top: int) -> list[int]:
    """Return the indices of the tuned blocks, rising.

    Args:
        placement: "ends" (first and last), "top" (last), or "all" (every block that an emulator
            keeps).
        num_blocks: Blocks of the full model.
        num_bottom: Blocks at the bottom, for "ends".
        num_top: Blocks at the top, for "ends" and "top".

    Raises:
        SplitError: If the model has fewer blocks.
    """
    if placement == "all":
        return list(range(num_blocks))
    bottom = num_bottom if placement == "ends" else 0
    if bottom + num_top > num_blocks:
        raise SplitError(
            f"adapter.placement {placement!r} wants {bottom + num_top} tuned blocks, "
            f"the model has {num_blocks}"
        )
    return [*range(bottom), *range(num_blocks - num_top, num_blocks)]
