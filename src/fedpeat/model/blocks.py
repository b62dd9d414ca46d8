"""Find the blocks of a network, whatever its architecture.

No architecture is named here. Blocks are the members of the outermost ``ModuleList`` that holds the
most parameters and, if any does, is as long as the configuration says. Where its members are stages
of different width (Swin), they are the members of each stage's own list. An encoder-decoder has two
such lists.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from fedpeat.config.schema import Cut
from fedpeat.core.errors import SplitError

__all__ = ["BlockList", "Blocks", "config_numbers", "find_blocks"]

_LIST = nn.ModuleList | nn.Sequential


@dataclass(frozen=True)
class BlockList:
    """One list of blocks.

    Attributes:
        paths: Dotted names, e.g. ("model.layers",). More than one where a network keeps the parts
            of a block in lists side by side: the i-th block is the i-th member of each.
        num_blocks: Length of the list.
    """

    paths: tuple[str, ...]
    num_blocks: int


@dataclass(frozen=True)
class Blocks:
    """Where a network keeps its blocks, numbered through all its lists.

    Attributes:
        lists: One list, or an encoder's and a decoder's, or one for each stage.
    """

    lists: tuple[BlockList, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of all lists together."""
        return sum(item.num_blocks for item in self.lists)

    @property
    def starts(self) -> list[tuple[BlockList, int]]:
        """Return each list with the index of its first block."""
        ends = itertools.accumulate((item.num_blocks for item in self.lists), initial=0)
        return list(zip(self.lists, ends, strict=False))

    @property
    def paths(self) -> str:
        """Return the lists' names for people to read."""
        return ", ".join(path for item in self.lists for path in item.paths)

    def names(self, index: int) -> tuple[str, ...]:
        """Return the dotted names of the modules that one block consists of, e.g. model.layers.3.

        Raises:
            SplitError: If there is no such block.
        """
        for item, start in self.starts:
            if 0 <= index - start < item.num_blocks:
                return tuple(f"{path}.{index - start}" for path in item.paths)
        raise SplitError(f"blocks are numbered from 0 to {self.num_blocks - 1}, got {index}")

    def parts(self, model: nn.Module, index: int) -> list[tuple[str, nn.Module]]:
        """Return the modules of one block with their dotted names."""
        return [(name, model.get_submodule(name)) for name in self.names(index)]

    def output(self, model: nn.Module, index: int) -> nn.Module:
        """Return the module of a block that puts out its hidden states."""
        return self.parts(model, index)[-1][1]

    def locate(self, name: str) -> int | None:
        """Return the block that a tensor belongs to, by its name; None if it is in no block."""
        found = self._find(name)
        return found[0] if found is not None else None

    def select(self, kept: Sequence[int]) -> Blocks:
        """Return the lists of a network that has only some blocks.

        Raises:
            SplitError: If the indices are not rising, are no blocks, or leave a list without any.
        """
        if (
            list(kept) != sorted(set(kept))
            or not kept
            or kept[0] < 0
            or kept[-1] >= self.num_blocks
        ):
            raise SplitError(
                f"kept blocks must be rising indices below {self.num_blocks}, got {list(kept)}"
            )
        selected = []
        for item, own in self.members(kept):
            if not own:
                raise SplitError(f"{item.paths[0]} must keep at least one block, got {list(kept)}")
            selected.append(BlockList(item.paths, len(own)))
        return Blocks(tuple(selected))

    def members(self, kept: Sequence[int]) -> list[tuple[BlockList, list[int]]]:
        """Return each list with the kept ones of its own members, counted from its own start."""
        return [
            (item, [i - start for i in kept if start <= i < start + item.num_blocks])
            for item, start in self.starts
        ]

    def rename(
        self, names: Iterable[str], target: Blocks, index_map: Mapping[int, int]
    ) -> dict[str, str]:
        """Map tensor names to those in a network that has the same blocks at other places.

        Args:
            names: Tensor names, e.g. "model.layers.4.mlp.up_proj.weight".
            target: The other network's lists.
            index_map: Index in the other network of each block that it has.

        Returns:
            New name of each name; a name in a block that the other network lacks is left out.
        """
        mapping = {}
        for name in names:
            found = self._find(name)
            if found is None:
                mapping[name] = name
            elif found[0] in index_map:
                index, part, start, end = found
                mapping[name] = name[:start] + target.names(index_map[index])[part] + name[end:]
        return mapping

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        paths = sorted((path for item in self.lists for path in item.paths), key=len, reverse=True)
        return re.compile(rf"(?:^|\.)(({'|'.join(map(re.escape, paths))})\.(\d+))(?=\.|$)")

    def _find(self, name: str) -> tuple[int, int, int, int] | None:
        """Return block, part of it, and where in a tensor's name the block's name stands."""
        match = self._pattern.search(name)
        if match is None:
            return None
        for item, start in self.starts:
            if match[2] in item.paths:
                return start + int(match[3]), item.paths.index(match[2]), *match.span(1)
        return None


def find_blocks(model: nn.Module, path: str | None = None, cut: Cut = "both") -> Blocks:
    """Return the blocks of a network.

    Args:
        model: Any network.
        path: Dotted name of the list to cut, where it shall not be found.
        cut: Which half of an encoder-decoder to look in.

    Raises:
        SplitError: If it has none, or only lists that do not fit its configuration, or runs the
            same block over and over, or lacks the half to cut.
    """
    if path is not None:
        return Blocks((_named_list(model, path),))
    halves = _halves(model)
    if cut != "both":
        if cut not in halves:
            raise SplitError(
                f"{type(model).__name__} has no {cut} to cut by itself; model.cut must be both, "
                f"got {cut}"
            )
        halves = {cut: halves[cut]}
    found = [_found_in(part, prefix, model) for prefix, part in halves.values()]
    return Blocks(tuple(item for items in found for item in items))


def _named_list(model: nn.Module, path: str) -> BlockList:
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, _LIST) or len(module) == 0:
        raise SplitError(
            f"{path} must be a ModuleList or Sequential of {type(model).__name__}, got "
            f"{type(module).__name__ if module is not None else 'nothing of that name'}; "
            f"found: {_listed(_outermost_lists(model, ''))}"
        )
    return BlockList((path,), len(module))


def _halves(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return where to look: both halves of an encoder-decoder, the text part of what also sees."""
    found: dict[str, tuple[str, nn.Module]] = {}
    if isinstance(model, transformers.PreTrainedModel):
        names = {id(module): name for name, module in model.named_modules()}
        two = _is_encoder_decoder(model)
        for half in ("encoder", "decoder") if two else ("decoder",):
            part = getattr(model, f"get_{half}")()
            if isinstance(part, nn.Module) and names.get(id(part)) and _outermost_lists(part, ""):
                found[half if two else "text"] = (names[id(part)], part)
    return found or {"whole": ("", model)}


def _is_encoder_decoder(model: transformers.PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _found_in(part: nn.Module, prefix: str, model: nn.Module) -> list[BlockList]:
    lists = _outermost_lists(part, prefix)
    counts = config_numbers(getattr(model, "config", None))
    most = _num_parameters(part) / 2
    fitting = [(name, m) for name, m in lists if not counts or len(m) in counts] or [
        (name, m) for name, m in lists if _num_parameters(m) > most
    ]
    if not fitting:
        raise SplitError(
            f"{type(model).__name__} has no list of blocks to cut: none is as long as a number in "
            f"its configuration or holds most of the parameters; found: {_listed(lists)}"
        )
    depth = _depth(model)
    path, blocks = max(fitting, key=lambda item: (len(item[1]) == depth, _num_parameters(item[1])))
    if _is_of_stages(blocks):
        stages = [_found_in_stage(stage, f"{path}.{i}") for i, stage in enumerate(blocks)]
        return [stage for stage in stages if stage is not None]
    if depth is not None and len(lists) == 1 and len(blocks) == 1 < depth:
        raise SplitError(
            f"{type(model).__name__} runs the one block in {path} {depth} times over, so that none "
            "can be dropped; blocks must have weights of their own, as in BERT or RoBERTa"
        )
    parent = path.rpartition(".")[0]
    beside = [
        name
        for name, m in fitting
        if name.rpartition(".")[0] == parent and len(m) == len(blocks) and name != path
    ]
    return [BlockList((*sorted(beside), path) if beside else (path,), len(blocks))]


def _outermost_lists(
    model: nn.Module, prefix: str
) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Return lists of modules that are inside no other list; Sequentials only if nothing else."""
    start = f"{prefix}." if prefix else ""
    for kind in (nn.ModuleList, nn.Sequential):
        lists = [
            (start + path, module)
            for path, module in model.named_modules()
            if path
            and isinstance(module, kind)
            and len(module) > 0
            and not re.search(r"(^|\.)\d+(\.|$)", path)
            and _num_parameters(module) > 0
        ]
        if lists:
            return lists
    return []


def _is_of_stages(blocks: nn.Module) -> bool:
    """Say whether each member has a list inside, and none is like another, or can be called."""
    members = list(blocks.children())
    pairs = itertools.combinations(map(_shapes, members), 2)
    return (
        len(members) > 1
        and (all(type(m) is nn.ModuleList for m in members) or not any(_alike(*p) for p in pairs))
        and all(_found_in_stage(member, "") is not None for member in members)
    )


def _found_in_stage(stage: nn.Module, path: str) -> BlockList | None:
    if isinstance(stage, _LIST):
        return BlockList((path,), len(stage)) if len(stage) else None
    lists = _outermost_lists(stage, path)
    if not lists:
        return None
    name, blocks = max(lists, key=lambda item: _num_parameters(item[1]))
    return BlockList((name.lstrip("."),), len(blocks))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters()}


def _alike(one: Mapping[str, torch.Size], other: Mapping[str, torch.Size]) -> bool:
    """Say whether the tensors that two members both have are of the same shapes."""
    common = one.keys() & other.keys()
    return bool(common) and all(one[name] == other[name] for name in common)


def _depth(model: nn.Module) -> int | None:
    """Return how many blocks the configuration says that text, or an image, passes through."""
    if not isinstance(model, transformers.PreTrainedModel) or _is_encoder_decoder(model):
        return None
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def config_numbers(config: Any) -> set[int]:
    """Return every whole number of a configuration, and of those inside it."""
    if config is None:
        return set()
    numbers: set[int] = set()
    waiting = [config.to_dict()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
            numbers.add(len(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            numbers.add(value)
    return numbers


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _listed(lists: Sequence[tuple[str, nn.Module]]) -> str:
    return ", ".join(f"{path} ({len(list(m.children()))})" for path, m in lists) or "none"
