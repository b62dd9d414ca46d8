"""Put products of two thin matrices in the place of a block's linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch, require_text, second_moments
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import (
    LayerSpec,
    LowRankLinear,
    is_plain_linear,
    matrix_of,
    replace_layers,
)

__all__ = ["factorise", "whitened_factors"]

_DAMPING = 1e-6


def factorise(
    model: nn.Module, blocks: Blocks, indices: Sequence[int], ratio: float, batches: Sequence[Batch]
) -> list[LayerSpec]:
    """Factor the linear layers of some blocks, in place, one block after the other.

    Each block is looked at with those before it factored already, so that it makes good a part of
    their error.

    Args:
        model: The emulator.
        blocks: Its blocks.
        indices: Blocks whose layers are factored.
        ratio: Share of each matrix's weights that is kept, in (0, 1].
        batches: Text whose activations say which directions matter.

    Returns:
        What was done to each layer.

    Raises:
        EmulatorError: If there is no text, or no linear layer.
    """
    require_text("low_rank", batches)
    specs = []
    for index in indices:
        layers = {
            f"{part_name}.{name}" if name else part_name: module
            for part_name, part in blocks.parts(model, index)
            for name, module in part.named_modules()
            if is_plain_linear(module)
        }
        moments = second_moments(model, layers, batches)
        for name, layer in layers.items():
            rank = _rank(layer.get_parameter("weight"), ratio)
            if rank:
                specs.append(_factorise_layer(model, name, layer, moments[name], rank))
    if not specs:
        raise EmulatorError(
            f"emulator.recipe low_rank finds no linear layer in the {len(indices)} kept blocks of "
            f"{type(model).__name__} that are not tuned; drop blocks instead"
        )
    return specs


def whitened_factors(
    weight: Float[Tensor, "outer inner"], moment: Float[Tensor, "inner inner"], rank: int
) -> tuple[Float[Tensor, "outer rank"], Float[Tensor, "rank inner"]]:
    """Return the two factors whose product changes a layer's output least.

    Args:
        weight: The matrix.
        moment: Mean of x x^T over the layer's inputs x.
        rank: Width between the factors.

    Source:
        Wang et al. (2024), SVD-LLM (arXiv:2403.07378): with S S^T = E[x x^T], the truncated SVD of
        W S, times the inverse of S.
    """
    energies, axes = torch.linalg.eigh(moment.double())
    scale = float(moment.diagonal().mean())
    # few inputs leave directions without energy, and rounding some with less than none
    usable = energies.clamp(min=_DAMPING * scale) if scale > 0 else torch.ones_like(energies)
    spread = axes * usable.sqrt()
    left, values, right = torch.linalg.svd(weight.double() @ spread, full_matrices=False)
    root = values[:rank].sqrt()
    up = left[:, :rank] * root
    down = root[:, None] * right[:rank] @ (axes / usable.sqrt()).T
    return up.float(), down.float()


def _rank(weight: Tensor, ratio: float) -> int:
    """Return the largest even rank within a share of the weights; 0 where factors would be more."""
    rank = max(2, int(ratio * weight.numel() / sum(weight.shape)) // 2 * 2)
    return rank if rank * sum(weight.shape) <= weight.numel() else 0


def _factorise_layer(
    model: nn.Module, name: str, layer: nn.Module, moment: Tensor, rank: int
) -> LayerSpec:
    bias = getattr(layer, "bias", None)
    up, down = whitened_factors(matrix_of(layer), moment, rank)
    spec = LayerSpec(name, "low_rank", rank)
    replace_layers(model, [spec])
    smaller = model.get_submodule(name)
    assert isinstance(smaller, LowRankLinear)
    with torch.no_grad():
        smaller.up.weight.copy_(up)
        smaller.down.weight.copy_(down)
        if bias is not None:
            smaller.up.bias.copy_(bias)
    smaller.requires_grad_(False)
    return spec
