"""Layers that take less room: matrices with fewer rows or columns, or in few bits.

A layer is described by a ``LayerSpec``, so that a device can build the empty layer before its
weights arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core.errors import SplitError

__all__ = [
    "SIZES",
    "FewBits",
    "Kept",
    "LayerKind",
    "LayerSpec",
    "is_plain_linear",
    "make_plain",
    "matrix_of",
    "num_parameters",
    "read_specs",
    "replace_layers",
]

LayerKind = Literal["fewer_outputs", "fewer_inputs", "size", "int8", "int4"]
Kept = Mapping[str, tuple[int, ...]]
"""Rows (NAME.rows) and columns (NAME.columns) that are left of larger layers, rising."""
SIZES = frozenset(
    {
        "all_head_size",
        "embed_dim",
        "hidden_size",
        "inner_dim",
        "n_head",
        "n_heads",
        "num_attention_heads",
        "num_heads",
        "num_key_value_groups",
        "num_key_value_heads",
        "split_size",
    }
)
"""Attributes in which modules keep how many heads they have, or how wide all of them are."""
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class LayerSpec:
    """How one layer differs from the full model's.

    Attributes:
        name: Dotted name in the emulator; of kind "size", that of an attribute of a module, one of
            ``SIZES``.
        kind: What it is instead.
        size: Outputs or inputs that are left of a layer with fewer; value of an attribute; weights
            that share a scale in a layer in few bits.
    """

    name: str
    kind: LayerKind
    size: int


def is_plain_linear(module: nn.Module) -> bool:
    """Say whether a layer holds one matrix and does nothing but multiply by it."""
    own = "weight" in module._parameters  # noqa: SLF001 - not one that is computed
    return own and type(module).forward in {nn.Linear.forward, Conv1D.forward}


def matrix_of(layer: nn.Module) -> Tensor:
    """Return the weights of a linear layer (outer, inner), whichever way round it stores them."""
    weight = layer.get_parameter("weight").detach()
    return weight.T if isinstance(layer, Conv1D) else weight


class FewBits(nn.Module):
    """A matrix in whole numbers of few bits, with a scale for each group of neighbours in a row.

    Args:
        shape: Rows and columns.
        bits: 8, or 4, two to a byte.
        group: Columns that share a scale; it divides their number.
        dtype: Type of the matrix that is computed with.
        device: Where it lives.

    Attributes:
        codes: The numbers (rows, columns * bits / 8).
        scale: Scales (rows, columns / group), in bfloat16.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        rows, columns = shape
        self.bits, self.group, self.dtype = bits, group, dtype
        self.shape = shape
        code_type = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer(
            "codes", torch.empty(rows, columns * bits // 8, dtype=code_type, device=device)
        )
        self.register_buffer(
            "scale", torch.empty(rows, columns // group, dtype=torch.bfloat16, device=device)
        )

    def fill(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Round a matrix to the nearest that fits.

        The scale of a group is the one of a few shares of its largest weight that leaves the least
        squared error; with 8 bits the whole of it does.
        """
        grouped = weight.detach().float().unflatten(1, (-1, self.group))
        largest = 2 ** (self.bits - 1) - 1
        top = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest
        tried: list[Tensor] = []
        for share in (1.0,) if self.bits == 8 else _SHARES:
            scale = (top * share).bfloat16()
            codes = (grouped / scale.float()).round().clamp(-largest - 1, largest)
            error = (codes * scale.float() - grouped).pow(2).sum(-1, keepdim=True)
            now = (error, codes, scale)
            if tried:
                better = error < tried[0]
                tried = [torch.where(better, new, old) for new, old in zip(now, tried, strict=True)]
            else:
                tried = list(now)
        self.codes.copy_(self._packed(tried[1].flatten(1)))
        self.scale.copy_(tried[2].squeeze(-1))

    def dense(self, rows: Integer[Tensor, ...] | None = None) -> Float[Tensor, "... columns"]:
        """Return the matrix, or some rows of it."""
        codes, scale = (
            (self.codes, self.scale) if rows is None else (self.codes[rows], self.scale[rows])
        )
        numbers = _unpacked(codes) if self.bits == 4 else codes
        grouped = numbers.unflatten(-1, (-1, self.group)).to(self.dtype)
        dense: Tensor = (grouped * scale.to(self.dtype).unsqueeze(-1)).flatten(-2)
        return dense

    def extra_repr(self) -> str:
        """Return what PyTorch prints of it."""
        return f"{self.shape}, bits={self.bits}, group={self.group}"

    def _packed(self, codes: Float[Tensor, "rows columns"]) -> Integer[Tensor, "rows packed"]:
        if self.bits == 8:
            return codes.to(torch.int8)
        shifted = (codes + 8).to(torch.uint8)
        return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


_SHARES = tuple(1 - step / 20 for step in range(10))


def _unpacked(codes: Integer[Tensor, "... packed"]) -> Integer[Tensor, "... columns"]:
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return pairs.to(torch.int8) - 8


class _Product(torch.autograd.Function):
    """Multiply by a matrix that is made anew in the backward pass, and so never kept."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, matrix: FewBits, transposed: bool) -> Tensor:  # noqa: FBT001 - as autograd calls it
        ctx.matrix, ctx.transposed = matrix, transposed
        dense = matrix.dense().to(value.dtype)
        return value @ (dense if transposed else dense.T)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        dense = ctx.matrix.dense().to(grads[0].dtype)
        return grads[0] @ (dense.T if ctx.transposed else dense), None, None


class _FewBitsLayer(nn.Module):
    """What the layers below have in common: a matrix in few bits in place of ``weight``."""

    few_bits: FewBits

    @property
    def weight(self) -> Tensor:
        """Return the matrix as numbers with a point."""
        return self.few_bits.dense()


class _FewBitsLinear(_FewBitsLayer, nn.Linear):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as PyTorch names it
        product: Tensor = _Product.apply(input, self.few_bits, False)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias  # type: ignore[redundant-expr]


class _FewBitsConv1D(_FewBitsLayer, Conv1D):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.few_bits, True)  # type: ignore[no-untyped-call]
        return product + self.bias


class _FewBitsEmbedding(_FewBitsLayer, nn.Embedding):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as PyTorch names it
        return self.few_bits.dense(input)


_FEW_BITS: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _FewBitsLinear,
    Conv1D: _FewBitsConv1D,
    nn.Embedding: _FewBitsEmbedding,
}


def replace_layers(model: nn.Module, specs: Sequence[LayerSpec]) -> None:
    """Put smaller layers in the places of a network's own, in order.

    Layers in few bits are filled with the rounded weights of those whose place they take; the
    others get their values later. Layers that share a matrix share it afterwards.

    Raises:
        SplitError: If the network has no such layer, or it cannot become what it should.
    """
    few_bits = [spec.name for spec in specs if spec.kind in BITS]
    tied = _tied_to(model, few_bits)
    for spec in specs:
        if spec.kind == "size":
            _set_size(model, spec)
        elif spec.kind in _SMALLER:
            parent, _, name = spec.name.rpartition(".")
            layer = _layer(model, spec.name)
            if not is_plain_linear(layer):
                raise SplitError(f"{spec.name} must be a linear layer, got {type(layer).__name__}")
            setattr(model.get_submodule(parent), name, _SMALLER[spec.kind](layer, spec.size))
        else:
            owner = tied.get(spec.name)
            shared = _layer(model, owner).few_bits if owner is not None else None
            _store_in_few_bits(_layer(model, spec.name), spec, shared)


def _layer(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SplitError(f"{type(model).__name__} has no layer {name}") from error


def _set_size(model: nn.Module, spec: LayerSpec) -> None:
    """Make an attribute of a module smaller; nothing but ``SIZES`` can be changed."""
    parent, _, name = spec.name.rpartition(".")
    old = vars(_layer(model, parent)).get(name)
    if name not in SIZES or type(old) is not int or not 1 <= spec.size <= old:
        raise SplitError(
            f"{spec.name} must be one of {', '.join(sorted(SIZES))} and at most as large as it is, "
            f"{old!r:.20}, got {spec.size}"
        )
    setattr(_layer(model, parent), name, spec.size)


def _tied_to(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return for each layer whose matrix an earlier one has too, that earlier one."""
    owners: dict[int, str] = {}
    tied = {}
    modules = dict(model.named_modules())
    for name in names:
        weight = getattr(modules.get(name), "_parameters", {}).get("weight")
        if weight is not None and owners.setdefault(id(weight), name) != name:
            tied[name] = owners[id(weight)]
    return tied


def _fewer_outputs(layer: Any, number: int) -> nn.Module:
    return _resized(layer, number, matrix_of(layer).shape[1])


def _fewer_inputs(layer: Any, number: int) -> nn.Module:
    return _resized(layer, matrix_of(layer).shape[0], number)


def _resized(layer: Any, outputs: int, inputs: int) -> nn.Module:
    """Return a layer of the same class, on the same device, of another size, with no values."""
    place = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if isinstance(layer, Conv1D):
        with init_empty_weights():
            empty = Conv1D(outputs, inputs)
        return empty.to_empty(device=place["device"]).to(place["dtype"])
    return nn.Linear(inputs, outputs, bias=layer.bias is not None, **place)


_SMALLER: Mapping[str, Callable[[Any, int], nn.Module]] = {
    "fewer_outputs": _fewer_outputs,
    "fewer_inputs": _fewer_inputs,
}


def _store_in_few_bits(module: nn.Module, spec: LayerSpec, shared: FewBits | None) -> None:
    kind = next((k for k in _FEW_BITS if isinstance(module, k)), None)
    weight: Any = module._parameters.pop("weight", None)  # noqa: SLF001 - the property takes its place
    if kind is None or weight is None:
        raise SplitError(f"{spec.name}, a {type(module).__name__}, cannot be stored in few bits")
    module.few_bits = shared or _few_bits(weight, spec)
    module.__class__ = _few_bits_class(type(module), _FEW_BITS[kind])


def _few_bits(weight: Tensor, spec: LayerSpec) -> FewBits:
    rows, columns = weight.shape
    device = torch.device("cpu") if weight.is_meta else weight.device
    store = FewBits((rows, columns), BITS[spec.kind], spec.size, weight.dtype, device)
    if not weight.is_meta:
        store.fill(weight)
    return store


def _few_bits_class(kind: type[nn.Module], few_bits: type[nn.Module]) -> type[nn.Module]:
    """Return a class that does what a layer did, with its matrix in few bits.

    A subclass with a way of its own (positions with an offset, scaled embeddings) keeps it.
    """
    if kind in _FEW_BITS:
        return few_bits
    return type(f"FewBits{kind.__name__}", (kind, few_bits), {})


def make_plain(model: nn.Module) -> None:
    """Turn layers in few bits back into plain ones that can be trained, in place.

    Their weights are those rounded ones that they computed with. Layers that shared a matrix share
    it afterwards.
    """
    plain = {few_bits: kind for kind, few_bits in _FEW_BITS.items()}
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        kind: Any = type(module)
        if isinstance(module, _FewBitsLayer):
            weight = nn.Parameter(module.weight.detach(), requires_grad=False)
            weight = weights.setdefault(id(module.few_bits), weight)
            del module.few_bits
            module.__class__ = plain.get(kind, kind.__bases__[0])
            module.register_parameter("weight", weight)


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights, those in few bits among them, tied ones counted once."""
    stores = {id(m): m for m in model.modules() if isinstance(m, FewBits)}
    return sum(p.numel() for p in model.parameters()) + sum(
        store.shape[0] * store.shape[1] for store in stores.values()
    )


def read_specs(items: Iterable[Mapping[str, Any]]) -> tuple[LayerSpec, ...]:
    """Return the specs in a manifest.

    Raises:
        SplitError: If one of them is none.
    """
    specs = []
    for item in items:
        name, kind, size = item.get("name"), item.get("kind"), item.get("size")
        known = kind in get_args(LayerKind) and isinstance(name, str)
        if not known or len(item) != 3 or type(size) is not int or size < 1:
            raise SplitError(f"not a layer's description: {dict(item)}")
        specs.append(LayerSpec(**item))
    return tuple(specs)
