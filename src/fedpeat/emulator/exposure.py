"""What stands open in an emulator: which of the full model's weights it holds as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpeat.emulator.package import Manifest
from fedpeat.model.loading import DTYPES

__all__ = ["NEAR", "Exposure", "exposure"]

NEAR = 0.05
"""Relative distance up to which a tensor counts as a near-copy, ||E - M|| <= NEAR ||M||."""


@dataclass(frozen=True)
class Exposure:
    """How many of the full model's parameters an emulator holds.

    Attributes:
        num_parameters: Parameters of the full model, tied ones counted once.
        num_equal: Of these, those in tensors that the emulator holds bit for bit, after both are
            rounded to the type that the emulator is stored in.
        num_near: Those in tensors that it holds up to NEAR, the equal ones included.
    """

    num_parameters: int
    num_equal: int
    num_near: int


def exposure(manifest: Manifest, emulator: nn.Module, full: nn.Module) -> Exposure:
    """Compare an emulator's weights with the full model's, by name.

    Tensors of one shape are compared whole. Where a layer was made narrower, its rows (or columns)
    are: each with the one of the full model that is nearest. A tensor without a partner, such as a
    factor of a low-rank layer, exposes nothing by this measure.

    Args:
        manifest: What the emulator is.
        emulator: Its network; quantised layers made plain before (``plain``).
        full: The full model.
    """
    own = manifest.blocks.select(manifest.source_blocks)
    held = dict(emulator.named_parameters(remove_duplicate=False))
    to_full = dict(enumerate(manifest.source_blocks))
    names = own.rename(held, manifest.blocks, to_full)
    by_full_name = {names[name]: tensor for name, tensor in held.items()}
    return _counted(dict(full.named_parameters()), by_full_name, DTYPES[manifest.dtype])


def _counted(
    full: Mapping[str, Tensor], held: Mapping[str, Tensor], dtype: torch.dtype
) -> Exposure:
    total, equal, near = 0, 0, 0
    for name, original in full.items():
        total += original.numel()
        if name in held:
            one = original.detach().to(dtype).double()
            other = held[name].detach().to(one.device, dtype).double()
            found = _matched(one, other)
            equal, near = equal + found[0], near + found[1]
    return Exposure(total, equal, near)


def _matched(original: Tensor, held: Tensor) -> tuple[int, int]:
    """Return how many values of a tensor are held as they are, and how many nearly so."""
    if original.shape == held.shape:
        return _whole(original, held)
    if original.ndim == held.ndim == 2 and original.shape[1] == held.shape[1]:
        return _by_row(original, held)
    if original.ndim == held.ndim == 2 and original.shape[0] == held.shape[0]:
        return _by_row(original.T, held.T)
    return 0, 0


def _whole(original: Tensor, held: Tensor) -> tuple[int, int]:
    size = original.numel()
    is_near = bool((held - original).norm() <= NEAR * original.norm())
    return size * int(torch.equal(original, held)), size * int(is_near)


def _by_row(
    original: Float[Tensor, "rows width"], held: Float[Tensor, "fewer width"]
) -> tuple[int, int]:
    nearest = original[torch.cdist(held, original).argmin(1)]
    distance = (held - nearest).norm(dim=1)
    equal = int((held == nearest).all(1).sum())
    return equal * held.shape[1], int((distance <= NEAR * nearest.norm(dim=1)).sum()) * held.shape[
        1
    ]
