"""What stands open in an emulator: which of the full model's weights it holds as they are."""

from __future__ import annotations

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

    Tensors of one shape are compared whole; of a layer in few bits or of low rank, the matrix that
    it amounts to. Where a layer was made narrower, its rows (or columns) are: each with the one of
    the full model that is nearest.

    Args:
        manifest: What the emulator is.
        emulator: Its network.
        full: The full model.
    """
    blocks, kept = manifest.blocks, manifest.source_blocks
    places = {index: place for place, index in enumerate(kept)}
    originals = dict(full.named_parameters())
    names = blocks.rename(originals, blocks.select(kept), places)
    dtype = DTYPES[manifest.dtype]
    equal, near = 0, 0
    for name, own_name in names.items():
        held = _tensor(emulator, own_name)
        if held is not None:
            one = originals[name].detach().to(dtype).double()
            found = _matched(one, held.detach().to(one.device, dtype).double())
            equal, near = equal + found[0], near + found[1]
    return Exposure(sum(p.numel() for p in originals.values()), equal, near)


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """Return a tensor by its dotted name, one that is computed as well."""
    value: object = model
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


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
