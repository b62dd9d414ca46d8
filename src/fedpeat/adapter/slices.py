"""Which entries of an adapter a narrower network has. NumPy only.

Where an emulator's layer lacks some rows or columns of the full model's, its LoRA lacks those rows
of B or those columns of A. The adapter everywhere is the full model's; a device is given its
entries. As (B A)[rows] = B[rows] A and (B A)[:, columns] = B A[:, columns], what a device tunes is
the full model's update where it has entries, and says nothing of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from fedpeat.adapter.lora import State
from fedpeat.core.errors import AdapterError

__all__ = ["Pieces", "Slice", "Slices", "common", "filled_in", "sliced", "slices_of"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Some entries of a tensor.

    Attributes:
        axis: Axis along which there are fewer.
        indices: Those that are there, rising.
    """

    axis: int
    indices: Int[np.ndarray, " kept"]

    def of(self, array: np.ndarray) -> np.ndarray:
        """Return these entries of a tensor."""
        return np.take(array, self.indices, axis=self.axis)

    def put(self, array: np.ndarray, entries: np.ndarray) -> None:
        """Write these entries into a tensor."""
        np.moveaxis(array, self.axis, 0)[self.indices] = np.moveaxis(entries, self.axis, 0)


Slices = Mapping[str, Slice]
"""Entries that a network has, by the names of the tensors of which it lacks some."""

_FACTORS = {".lora_A.weight": ("columns", 1), ".lora_B.weight": ("rows", 0)}
_VECTOR = ".ia3_l"  # (outputs, 1), or (1, inputs) where it comes before the layer


def slices_of(
    shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, Sequence[int]]
) -> dict[str, Slice]:
    """Return the entries of an adapter that a network with narrower layers has.

    Args:
        shapes: Shapes of the adapter's tensors in the full model.
        kept: Rows (NAME.rows) and columns (NAME.columns) that are left of the full model's layers.

    Raises:
        AdapterError: If a tensor sits on a narrower layer and cannot be cut exactly, as DoRA's
            magnitudes, which are norms of whole rows.
    """
    layers = {key.rpartition(".")[0] for key in kept}
    slices = {}
    for name, shape in shapes.items():
        suffix = next((s for s in (*_FACTORS, _VECTOR) if name.endswith(s)), None)
        if suffix is None:
            if layers.intersection(_stems(name)):
                raise AdapterError(
                    f"adapter tensor {name} sits on a layer that the emulator has narrower; "
                    "allowed there: lora without use_dora, and ia3"
                )
            continue
        before = ("columns", 1) if shape[0] == 1 else ("rows", 0)
        side, axis = before if suffix == _VECTOR else _FACTORS[suffix]
        if (indices := kept.get(f"{name.removesuffix(suffix)}.{side}")) is not None:
            slices[name] = Slice(axis, np.asarray(indices, np.int64))
    return slices


def _stems(name: str) -> list[str]:
    """Return the names of the layers that a tensor may belong to."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]


def sliced(adapter: State, slices: Slices) -> dict[str, np.ndarray]:
    """Return the entries of an adapter that a network has."""
    return {n: slices[n].of(a) if n in slices else a for n, a in adapter.items()}


def filled_in(adapter: State, slices: Slices, entries: State) -> dict[str, np.ndarray]:
    """Return an adapter with the entries that a network has in it, and the others as they were."""
    filled = dict(adapter)
    for name, values in entries.items():
        if name in slices:
            filled[name] = adapter[name].copy()
            slices[name].put(filled[name], values)
        else:
            filled[name] = values
    return filled


def common(states: Sequence[State], slices: Sequence[Slices]) -> list[dict[str, np.ndarray]]:
    """Return what is left of some adapters where each tensor has the entries that all have.

    Args:
        states: Entries of each participant; those on a smaller rung have fewer tensors.
        slices: Which these are.
    """
    shared: dict[str, Slice] = {}
    for own in slices:
        for name, part in own.items():
            before = shared.get(name, part).indices
            shared[name] = Slice(part.axis, np.intersect1d(before, part.indices))
    return [
        {
            name: _places(shared[name], own.get(name)).of(array) if name in shared else array
            for name, array in state.items()
        }
        for state, own in zip(states, slices, strict=True)
    ]


def _places(part: Slice, held: Slice | None) -> Slice:
    """Return where some entries stand in a tensor that has those held alone."""
    return (
        part
        if held is None
        else Slice(part.axis, np.searchsorted(held.indices, part.indices).astype(np.int64))
    )


class Pieces:
    """An adapter in pieces, each of which a rung has whole or not at all.

    What is said of tensors that some participants lack, how they are averaged and that they stay
    where nobody has them, then holds for entries.

    Args:
        adapter: The adapter of the full model.
        rungs: Entries that each rung has.
    """

    def __init__(self, adapter: State, rungs: Iterable[Slices]) -> None:
        self._names = list(adapter)
        held: dict[str, list[Slice]] = {}
        for slices in rungs:
            for name, part in slices.items():
                held.setdefault(name, []).append(part)
        self._parts = {name: _apart(adapter[name].shape, own) for name, own in held.items()}

    def cut(self, adapter: State, held: Slices) -> dict[str, np.ndarray]:
        """Return the pieces of an adapter, or of the entries of it that are held."""
        pieces = {}
        for name, array in adapter.items():
            if name not in self._parts:
                pieces[name] = array
                continue
            own = held.get(name)
            for number, part in enumerate(self._parts[name]):
                if own is None or np.isin(part.indices, own.indices).all():
                    pieces[f"{name}#{number}"] = _places(part, own).of(array)
        return pieces

    def join(self, pieces: State) -> dict[str, np.ndarray]:
        """Return the adapter that pieces make up."""
        return {name: self._joined(name, pieces) for name in self._names}

    def _joined(self, name: str, pieces: State) -> np.ndarray:
        if name not in self._parts:
            return pieces[name]
        parts = {f"{name}#{n}": part for n, part in enumerate(self._parts[name])}
        first = pieces[next(iter(parts))]
        axis = next(iter(parts.values())).axis
        shape = list(first.shape)
        shape[axis] = sum(len(part.indices) for part in parts.values())
        whole = np.empty(shape, first.dtype)
        for key, part in parts.items():
            part.put(whole, pieces[key])
        return whole


def _apart(shape: tuple[int, ...], held: Sequence[Slice]) -> list[Slice]:
    """Return the entries of a tensor by who holds them."""
    axis = held[0].axis
    indices = np.arange(shape[axis])
    holds = np.stack([np.isin(indices, part.indices) for part in held])  # (rungs, entries)
    _, group = np.unique(holds, axis=1, return_inverse=True)
    group = group.reshape(-1)
    return [Slice(axis, np.flatnonzero(group == number)) for number in range(group.max() + 1)]
