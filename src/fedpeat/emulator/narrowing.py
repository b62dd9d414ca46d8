"""Take rows and columns out of the linear layers of a block, and see whether it works without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedpeat.emulator.calibration import Batch
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import Kept, LayerSpec, is_plain_linear, matrix_of, replace_layers

__all__ = [
    "Cut",
    "Narrowed",
    "changing",
    "differing",
    "inputs_of",
    "narrow",
    "plain_layers",
    "silenced",
    "through",
    "works_narrower",
]


_LITTLE = 0.2


@dataclass(frozen=True)
class Cut:
    """What stays of some layers, and of what their modules say of them.

    Attributes:
        rows: Rows that stay of the layers before, by their names.
        after: Name of the layer after.
        columns: Columns that stay of it.
        sizes: New values of attributes of modules, by their dotted names.
    """

    rows: Mapping[str, Int[Tensor, " rows"]]
    after: str
    columns: Int[Tensor, " columns"]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Narrowed:
    """What was done to layers, and what they still have of the larger ones."""

    layers: list[LayerSpec]
    kept: Kept

    def __add__(self, other: Narrowed) -> Narrowed:
        return Narrowed([*self.layers, *other.layers], through(self.kept, other.kept))


def through(first: Kept, second: Kept) -> dict[str, tuple[int, ...]]:
    """Return what is left after two cuts, the second of which counts what the first left."""
    again = {
        name: tuple(first[name][i] for i in own) if name in first else own
        for name, own in second.items()
    }
    return {**first, **again}


def plain_layers(model: nn.Module, blocks: Blocks, index: int) -> dict[str, nn.Module]:
    """Return the layers inside a block that hold one matrix, by their names."""
    return {
        f"{part_name}.{name}": module
        for part_name, part in blocks.parts(model, index)
        for name, module in part.named_modules()
        if name and is_plain_linear(module)
    }


def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> dict[str, Float[Tensor, "... columns"]]:
    """Return what goes into layers in a call of the network, of those that are called once."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, inputs, name=name: seen[name].append(inputs[0].clone())
        )
        for name, layer in layers.items()
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: values[0] for name, values in seen.items() if len(values) == 1}


@contextmanager
def changing(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a layer puts out, for a while."""
    handle = layer.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def differing(one: Tensor, other: Tensor) -> Bool[Tensor, " columns"]:
    """Return the columns in which two inputs of a layer differ; none if their shapes do."""
    if one.shape != other.shape:
        return torch.zeros(one.shape[-1], dtype=torch.bool)
    return (one != other).flatten(0, -2).any(0).cpu()


def narrow(model: nn.Module, cut: Cut, outgoing: Float[Tensor, "outer columns"]) -> Narrowed:
    """Put narrower layers into a network.

    Args:
        model: The network.
        cut: What stays.
        outgoing: Weights of the columns that stay.
    """
    specs, kept = [], {}
    for name, rows in cut.rows.items():
        old = model.get_submodule(name)
        bias = _bias(old)
        spec = LayerSpec(name, "fewer_outputs", len(rows))
        _replace(model, spec, matrix_of(old)[rows], None if bias is None else bias[rows])
        specs.append(spec)
        kept[f"{name}.rows"] = tuple(rows.tolist())
    spec = LayerSpec(cut.after, "fewer_inputs", len(cut.columns))
    _replace(model, spec, outgoing, _bias(model.get_submodule(cut.after)))
    kept[f"{cut.after}.columns"] = tuple(cut.columns.tolist())
    sizes = [LayerSpec(name, "size", value) for name, value in cut.sizes.items()]
    replace_layers(model, sizes)
    return Narrowed([*specs, spec, *sizes], kept)


def works_narrower(model: nn.Module, cut: Cut, batch: Batch) -> bool:
    """Try a cut, and compare with all rows and the other columns at zero; nothing is changed.

    The two must differ by little beside what the columns that stay do for the network, so that what
    is little depends neither on the scale of its output nor on the precision that it computes in,
    and columns without any effect can be left out.
    """
    names = [*cut.rows, cut.after]
    old = {name: model.get_submodule(name) for name in names}
    sizes = {name: getattr(*_place(model, name)) for name in cut.sizes}
    silent = torch.ones(matrix_of(old[cut.after]).shape[1], dtype=torch.bool)
    silent[cut.columns] = False
    with silenced(old[cut.after], silent):
        wanted = _output(model, batch)
    with silenced(old[cut.after], torch.ones_like(silent)):
        nothing = _output(model, batch)
    try:
        narrow(model, cut, matrix_of(old[cut.after])[:, cut.columns].float())
        got = _output(model, batch)
    except (RuntimeError, ValueError):  # a view into heads, say, that fixes the number
        return False
    finally:
        for name, module in old.items():
            setattr(*_place(model, name), module)
        for name, value in sizes.items():
            setattr(*_place(model, name), value)
    if wanted.shape != got.shape:
        return False
    error, effect = (float((other - wanted).float().norm()) for other in (got, nothing))
    return error <= _LITTLE * effect


@contextmanager
def silenced(layer: nn.Module, columns: Bool[Tensor, " columns"]) -> Iterator[None]:
    """Let some columns of a layer see nothing but zeros for a while."""

    def silence(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].masked_fill(columns.to(inputs[0].device), 0), *inputs[1:])

    handle = layer.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


def _output(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    result: Tensor = output.logits if hasattr(output, "logits") else output
    return result


def _replace(model: nn.Module, spec: LayerSpec, matrix: Tensor, bias: Tensor | None) -> None:
    replace_layers(model, [spec])
    layer = model.get_submodule(spec.name)
    with torch.no_grad():
        matrix_of(layer).copy_(matrix)
        if bias is not None:
            layer.get_parameter("bias").copy_(bias)
    layer.requires_grad_(False)


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
