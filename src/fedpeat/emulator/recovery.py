"""What an attacker starts from: an emulator's network to train, whole again, or none at all.

All of it is made from the emulator's own files, as a device has them.
"""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn

from fedpeat.emulator.package import EmulatorPackage
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import cut_in_place, frozen, index_attributes, skeleton
from fedpeat.model.layers import make_plain

__all__ = ["from_scratch", "misses_blocks", "random_network", "reinserted", "trainable"]


def misses_blocks(package: EmulatorPackage) -> bool:
    """Say whether blocks were dropped."""
    return len(package.manifest.source_blocks) < package.manifest.blocks.num_blocks


def trainable(package: EmulatorPackage, device: torch.device) -> transformers.PreTrainedModel:
    """Return an emulator's network in float32 with every weight to be trained."""
    model = package.build(device, torch.float32)
    make_plain(model)
    return _to_train(model, device)


def from_scratch(
    package: EmulatorPackage, device: torch.device, seed: int
) -> transformers.PreTrainedModel:
    """Return a random network with as many blocks as the emulator, to be trained."""
    model = random_network(package, seed)
    cut_in_place(model, package.manifest.blocks, package.manifest.source_blocks)
    return _to_train(model, device)


def reinserted(
    package: EmulatorPackage, device: torch.device, seed: int
) -> transformers.PreTrainedModel:
    """Return a network with all blocks of the full model, to be trained.

    A missing block begins as a copy of the nearest kept one of its kind (of two, the one below),
    and stays random where the emulator holds none. What is outside of the blocks is the emulator's.
    """
    manifest = package.manifest
    blocks, kept = manifest.blocks, list(manifest.source_blocks)
    emulator = package.build(torch.device("cpu"), torch.float32)
    make_plain(emulator)
    model = random_network(package, seed)
    _copy_rest(model, emulator, blocks)
    own = blocks.select(kept)
    sources = [_nearest(model, blocks, kept, index) for index in range(blocks.num_blocks)]
    for index, nearest in enumerate(sources):
        if nearest is None:
            continue
        place = kept.index(nearest)
        for (name, _), (_, source) in zip(
            blocks.parts(model, index), own.parts(emulator, place), strict=True
        ):
            _put(model, name, _moved(source, place, index))
    return _to_train(model, device)


def random_network(package: EmulatorPackage, seed: int) -> transformers.PreTrainedModel:
    """Return the full model's network as its configuration makes it, with random weights."""
    manifest = package.manifest
    every = range(manifest.blocks.num_blocks)
    hollow = skeleton(manifest.architecture, package.config, manifest.blocks, every, torch.float32)
    kind, config = type(hollow), hollow.config
    del hollow
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = kind._from_config(config, dtype=torch.float32)  # noqa: SLF001 - there is no public name
    return frozen(model, torch.device("cpu"))


def _nearest(model: nn.Module, blocks: Blocks, kept: list[int], index: int) -> int | None:
    kind = _kind(model, blocks, index)
    alike = [i for i in kept if _kind(model, blocks, i) == kind]
    return min(alike, key=lambda i: (abs(i - index), i), default=None)


def _kind(model: nn.Module, blocks: Blocks, index: int) -> tuple[object, ...]:
    """Return list and tensors of a block: one of the encoder cannot stand in the decoder."""
    owner = next(item for item, start in reversed(blocks.starts) if index >= start)
    parts = [part for _, part in blocks.parts(model, index)]
    return owner, *((name, p.shape) for part in parts for name, p in part.named_parameters())


def _moved(block: nn.Module, place: int, index: int) -> nn.Module:
    """Return a copy of a block that knows its new place."""
    moved = copy.deepcopy(block)
    for module, name in index_attributes(moved, place):
        setattr(module, name, index)
    return moved


def _copy_rest(model: nn.Module, emulator: nn.Module, blocks: Blocks) -> None:
    """Give a network the emulator's tensors outside of the blocks, where they have its shapes."""
    held = dict(emulator.named_parameters()) | dict(emulator.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found = held.get(name)
        if blocks.locate(name) is None and found is not None and found.shape == tensor.shape:
            with torch.no_grad():
                tensor.copy_(found)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _to_train(
    model: transformers.PreTrainedModel, device: torch.device
) -> transformers.PreTrainedModel:
    frozen(model, device)
    model.requires_grad_(True)
    return model
