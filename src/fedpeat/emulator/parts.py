"""The parts in which an emulator travels: one for each block, and one for what is outside them.

A part is a safetensors file whose tensors have their names in the full model. It is known by its
hash, wherever its block stands in an emulator, so that two emulators have the parts of their common
blocks in common, and nobody is sent a part twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, MutableMapping

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
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

    The library gives them in another order each time, and sums depend on the order.

    Raises:
        EmulatorError: If it is no safetensors file, or a value is not finite; a number that stands
            alone may be infinite, as the bounds of layers that clip what they get.
    """
    tensors = {}
    try:
        loaded = safetensors.torch.load(content)
        for name in sorted(loaded):
            tensors[name] = loaded.pop(name).clone()
            if not _is_sound(tensors[name]):
                raise EmulatorError(f"{name} has values that are not finite")
    except EmulatorError:
        raise
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise EmulatorError(f"a part of {len(content)} bytes cannot be read: {error}") from error
    return tensors


def _is_sound(tensor: Tensor) -> bool:
    """Say whether all values are finite, without a copy of them."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.aminmax()  # NaN if one of them is
    limit = tensor.ndim == 0 and not bool(tensor.isnan())  # a bound that is infinite is none
    return limit or bool(least.isfinite() and most.isfinite())


def tensor_names(content: bytes) -> list[str]:
    """Return the names of a part's tensors; what is in its file belongs to one of them.

    Raises:
        EmulatorError: If it is no safetensors file, or has bytes that belong to none.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        end = max((item["data_offsets"][1] for item in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EmulatorError(f"a part of {len(content)} bytes cannot be read: {error!r}") from error
    if start + end != len(content):
        raise EmulatorError(f"a part of {len(content)} bytes has some that belong to no tensor")
    return list(header)


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
