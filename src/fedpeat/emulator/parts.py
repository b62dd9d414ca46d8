"""The parts in which an emulator travels: one for each block, and one for what is outside them.

A part is a safetensors file whose tensors have their names in the full model. It is known by its
hash, wherever its block stands in an emulator, so that two emulators have the parts of their common
blocks in common, and nobody is sent a part twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.model.blocks import Blocks

__all__ = [
    "OUTSIDE",
    "Contents",
    "Tensors",
    "fill",
    "part_bytes",
    "part_hash",
    "read_part",
    "short",
    "split",
    "tensor_names",
    "untied_state",
]

Tensors = Mapping[str, Tensor]
OUTSIDE = "outside"
_SHORT = 16  # hexadecimal digits
_DTYPES = {  # by their names in safetensors files; of no others can be said what is finite
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def short(sha256: str) -> str:
    """Return the beginning of a hash, with which a device says what it holds."""
    return sha256[:_SHORT]


def split(state: Tensors, blocks: Blocks) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each part by the part's name.

    Args:
        state: Tensors by their name in the full model.
        blocks: The full model's blocks.
    """
    parts: dict[str, dict[str, Tensor]] = {OUTSIDE: {}}
    for name, tensor in state.items():
        index = blocks.locate(name)
        parts.setdefault(OUTSIDE if index is None else f"block {index}", {})[name] = tensor
    return parts


def part_bytes(tensors: Tensors) -> bytes:
    """Return the file of a part; the same tensors give the same bytes."""
    return bytes(safetensors.torch.save(dict(tensors), metadata={"format": "pt"}))


def part_hash(content: bytes) -> str:
    """Return the hash by which a part is known."""
    return hashlib.sha256(content).hexdigest()


class Contents(Mapping[str, bytes]):
    """The bytes of parts that are arrays, by hash: the very ones that an array was made of.

    Where those are others, only the part that is asked for is copied, so that an emulator, which
    may be as large as a device's memory allows, is not there twice.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, sha256: str) -> bytes:
        array = self._arrays[sha256]
        whole: object = array.base  # the bytes of np.frombuffer, whatever its types say
        return whole if isinstance(whole, bytes) and len(whole) == array.size else array.tobytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._arrays


def read_part(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a part, in memory of their own, in the order of their names.

    Sums depend on that order, and on where tensors begin in memory: so they are neither views of
    the part, nor read by the library, which takes memory for all of a part once more.

    Raises:
        EmulatorError: If it is no safetensors file, or a value is not finite; a number that stands
            alone may be infinite, as the bounds of layers that clip what they get.
    """
    tensors = {}
    for name, entry in sorted(_entries(content).items()):
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError as error:
            raise _unreadable(content, error) from error
        if tensor.numel():
            raw = np.frombuffer(content, np.uint8, entry.num_bytes, entry.start)
            tensor.reshape(-1).view(torch.uint8).numpy()[:] = raw
        if not _is_sound(tensor):
            raise EmulatorError(f"{name} has values that are not finite")
        tensors[name] = tensor
    return tensors


def _is_sound(tensor: Tensor) -> bool:
    """Say whether all values are finite, without a copy of them."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.aminmax()  # NaN if one of them is
    limit = tensor.ndim == 0 and not bool(tensor.isnan())  # a bound that is infinite is none
    return limit or bool(least.isfinite() and most.isfinite())


def tensor_names(content: bytes) -> list[str]:
    """Return the names of a part's tensors; every byte of its file belongs to one of them.

    Raises:
        EmulatorError: If it is no safetensors file, or has bytes that belong to none.
    """
    return list(_entries(content))


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in a safetensors file.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        start: Its first byte.
        num_bytes: Its length [B].
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def _entries(content: bytes) -> dict[str, _Entry]:
    """Read the header of a safetensors file: its tensors follow one another, without a gap.

    Source:
        https://github.com/huggingface/safetensors#format
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        entries = {name: _entry(item, begin) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(content, error) from error
    end = begin
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.num_bytes)):
        if entry.start != end:
            raise EmulatorError(f"a part of {len(content)} bytes has tensors that do not adjoin")
        end += entry.num_bytes
    if end != len(content):
        raise EmulatorError(f"a part of {len(content)} bytes has some that belong to no tensor")
    return entries


def _entry(item: Any, begin: int) -> _Entry:
    """Read what a header says of a tensor.

    Raises:
        ValueError: If it contradicts itself; errors of other kinds if it is something else.
    """
    dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
    start, end = item["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end)):
        raise ValueError(f"shape and offsets must be whole numbers, got {shape} and {start, end}")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{end - start} bytes hold no {dtype} of shape {shape}")
    return _Entry(dtype, shape, begin + start, end - start)


def _unreadable(content: bytes, error: Exception) -> EmulatorError:
    return EmulatorError(f"a part of {len(content)} bytes cannot be read: {error!r:.200}")


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state without second names of one tensor, which safetensors would refuse."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def fill(
    model: nn.Module,
    names: Mapping[str, str],
    parts: Collection[MutableMapping[str, Tensor]],
    device: torch.device,
) -> None:
    """Give a network its values: every tensor of it, tied ones once, and none besides.

    Tensors of the right type on the right device become the network's own without a copy; others
    are replaced in ``parts`` by what was made of them. Networks filled from the same parts share
    their memory.

    Args:
        model: The network.
        names: Name in the full model of each tensor of the network.
        parts: Tensors by their name in the full model.
        device: Where the network is to be.

    Raises:
        EmulatorError: If names or shapes differ.
    """
    wanted = {names[name]: tensor for name, tensor in untied_state(model).items()}
    holder = {name: part for part in parts for name in part}
    if wanted.keys() != holder.keys():
        raise EmulatorError(
            f"tensors differ from the configuration's: {sorted(wanted.keys() ^ holder.keys())[:5]}"
        )
    values: dict[int, Tensor] = {}
    for name, like in wanted.items():
        part = holder[name]
        if part[name].shape != like.shape:
            want, got = tuple(like.shape), tuple(part[name].shape)
            raise EmulatorError(f"{name} must have shape {want}, got {got}")
        part[name] = part[name].to(device, like.dtype)
        values[id(like)] = part[name]
    _replace(model, values)


def _replace(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Put values in the place of a network's tensors, by the id of each.

    Every network has parameters of its own over the common memory, so that what is trained in one
    is marked in that one. Running statistics, which training changes, are copied.
    """
    parameters = {key: nn.Parameter(value, requires_grad=False) for key, value in values.items()}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            module.register_parameter(name, parameters[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) in values:
                changes = hasattr(module, "running_mean")
                value = values[id(buffer)]
                setattr(module, name, value.clone() if changes else value)
