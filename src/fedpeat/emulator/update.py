"""A low-rank update of an emulator: what a small message adds to the weights that devices hold.

The factors stay factors. A device that multiplied them into its weights would round as its own
processor does; so all hold the same bits, and the parts that were sent before stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.parts import Tensors
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import FewBits, is_plain_linear

__all__ = ["UPDATE", "add_update", "fresh_update"]

UPDATE = "update"
"""Name of the part that holds it."""

_A, _B = ".lora_A", ".lora_B"


def fresh_update(
    model: nn.Module, blocks: Blocks, places: Sequence[int], rank: int, seed: int
) -> dict[str, Tensor]:
    """Return factors that change nothing yet, for every linear layer of some blocks.

    Args:
        model: The network.
        blocks: Its blocks.
        places: Which of them to update.
        rank: Rank of each update, or the layer's smaller side where that is less.
        seed: Seed of the factors A; the factors B are zero.

    Raises:
        EmulatorError: If there is no linear layer.

    Source:
        Hu et al. (2022), LoRA.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for place in places:
        for part_name, part in blocks.parts(model, place):
            for name, (d_in, d_out) in _linear_layers(part, part_name):
                r = min(rank, d_in, d_out)
                a = torch.randn(r, d_in, generator=random) / d_in**0.5
                factors |= {name + _A: a.to(device), name + _B: torch.zeros(d_out, r).to(device)}
    if not factors:
        raise EmulatorError(
            "server.realign_rank must be 0 for this model: its middle has no linear layer for a "
            "low-rank update"
        )
    return factors


def add_update(model: nn.Module, factors: Tensors) -> None:
    """Make a network compute with W + B A in the place of W, wherever there are factors.

    Args:
        model: The network; to be updated before an adapter is attached.
        factors: A (r, d_in) and B (d_out, r) by the layers' names in this network.

    Raises:
        EmulatorError: If the network has no such layer, or a factor another shape.
    """
    modules = dict(model.named_modules())
    for name in sorted(n.removesuffix(_A) for n in factors if n.endswith(_A)):
        a, b = factors[name + _A], factors.get(name + _B)
        sides = _sides(modules[name]) if name in modules else None
        fits = b is not None and sides == (a.shape[-1], b.shape[0]) and a.shape[0] == b.shape[-1]
        if b is None or not fits:
            raise EmulatorError(f"the update of {name} does not fit the network")
        modules[name].register_forward_hook(_adding(a, b))


def _adding(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(
        _module: nn.Module, inputs: tuple[Any, ...], output: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        x = inputs[0]
        return output + linear(linear(x, a.to(x.dtype)), b.to(x.dtype))

    return hook


def _linear_layers(part: nn.Module, prefix: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the linear layers of a block's part with their sides; halves of a product are none."""
    if (sides := _sides(part)) is not None:
        yield prefix, sides
        return
    for name, child in part.named_children():
        yield from _linear_layers(child, f"{prefix}.{name}")


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """Return what a linear layer reads and writes; None for all else, routers among them."""
    few_bits = getattr(module, "few_bits", None)
    if isinstance(module, Conv1D):
        rows, columns = few_bits.shape if isinstance(few_bits, FewBits) else module.weight.shape
        return int(rows), int(columns)
    if isinstance(module, nn.Linear) and (isinstance(few_bits, FewBits) or is_plain_linear(module)):
        return module.in_features, module.out_features
    return None
