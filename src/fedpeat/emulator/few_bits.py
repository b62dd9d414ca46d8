"""Store an emulator's frozen matrices in 8 or 4 bits."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core.errors import EmulatorError
from fedpeat.model.layers import LayerKind, LayerSpec, replace_layers

__all__ = ["store_in_few_bits"]

_MOST_PER_SCALE = 128
_FEWEST_PER_SCALE = 16


def store_in_few_bits(model: nn.Module, kind: LayerKind) -> list[LayerSpec]:
    """Round all matrices and embeddings of a network, in place.

    Weights are rounded to the nearest of 255 or 16 evenly spaced values. With 8 bits a row has one
    scale of 16 bits; with 4 bits up to 128 neighbours of a row have one.

    Args:
        model: A network; what is tuned later is put on top.
        kind: "int8" or "int4".

    Returns:
        What was done to each layer.

    Raises:
        EmulatorError: If a row cannot be packed, or most of the weights are in no such layer.

    Source:
        Dettmers et al. (2022), LLM.int8(): a scale for each row; Dettmers, Zettlemoyer (2023), The
        case for 4-bit precision: small groups and a scale of least squared error.
    """
    layers = _matrices(model)
    _check_share(model, layers, kind)
    specs = [LayerSpec(name, kind, _group(name, layer, kind)) for name, layer in layers.items()]
    replace_layers(model, specs)
    return specs


def _matrices(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and "weight" in _own(module)
    }


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _group(name: str, layer: nn.Module, kind: LayerKind) -> int:
    columns = int(_own(layer)["weight"].shape[1])
    if kind == "int8":
        return columns
    if columns % 2:
        raise EmulatorError(
            f"int4 packs two weights to a byte; rows of {name} must have an even length, got "
            f"{columns}; int8 would work"
        )
    sizes = [n for n in range(_FEWEST_PER_SCALE, _MOST_PER_SCALE + 1) if columns % n == 0]
    return max(sizes, default=columns)


def _check_share(model: nn.Module, layers: dict[str, nn.Module], kind: LayerKind) -> None:
    stored = {id(_own(layer)["weight"]) for layer in layers.values()}
    rest = {n: p for n, p in model.named_parameters() if id(p) not in stored and p.ndim > 1}
    left = sum(p.numel() for p in rest.values())
    total = left + sum(p.numel() for p in model.parameters() if id(p) in stored)
    if 2 * left > total or not stored:
        largest = max(rest, key=lambda name: rest[name].numel(), default="")
        raise EmulatorError(
            f"{kind} stores linear layers and embeddings, which are only "
            f"{(total - left) / max(1, total):.0%} of the weights of {type(model).__name__}; "
            f"the largest of the others is {largest or 'none'}; leave {kind} out of the recipe"
        )
