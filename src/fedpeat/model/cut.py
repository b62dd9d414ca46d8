"""Take blocks out of a network: for a while, in a copy, or in one built from its settings."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import BlockList, Blocks
from fedpeat.model.layers import LayerSpec, replace_layers
from fedpeat.model.tracing import reshaping_blocks

__all__ = [
    "borrow_blocks",
    "build_from_blocks",
    "cut_in_place",
    "frozen",
    "index_attributes",
    "only_blocks",
    "reasons_to_keep",
    "required_blocks",
    "skeleton",
]

Network = TypeVar("Network", bound=nn.Module)

_COUNT = re.compile(r"layers?$|^num_(blocks|hidden_groups)$")
_WHICH = re.compile(r"layers?$|layers?_(ids?|idxs?|indices)$")
_INDEX = re.compile(r"^(layer|block)_(idx|id|index|number)$")
_BY_INDEX = re.compile(r"^(layer|block)_(dic|dict|map)$")


def required_blocks(
    model: nn.Module, blocks: Blocks, batch: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the blocks that nothing can stand in for.

    Args:
        model: The full model.
        blocks: Its blocks.
        batch: Inputs to trace a call with; without them shapes are not looked at.
    """
    return sorted(reasons_to_keep(model, blocks, batch))


def reasons_to_keep(
    model: nn.Module, blocks: Blocks, batch: Mapping[str, Any] | None = None
) -> dict[int, str]:
    """Return why nothing can stand in for a block, by block.

    These are the only ones of their kind in their list (the first block of T5, which computes the
    position bias of all others; the one attention layer of a hybrid stack; the one with full
    attention among sliding windows; the dense layer before the experts), and those that share
    weights with another block, or keep the keys and values that later blocks read (Gemma 3n and 4).
    A traced call shows those that change the shape of what passes through them (the first of a
    stage of a convolutional network).
    """
    alone = set()
    for item, start in blocks.starts:
        kinds = _kinds(model, item)
        counts = Counter(kinds)
        if len(counts) > 1:
            alone |= {start + i for i, kind in enumerate(kinds) if counts[kind] == 1}
    reshaping = reshaping_blocks(model, blocks, batch) if batch is not None else set()
    found = {
        "changes the shape": reshaping,
        "is alone of its kind": alone,
        "keeps keys and values for others": _lending_blocks(model, blocks),
        "shares weights": _sharing_blocks(model, blocks),
    }
    return {index: reason for reason, indices in found.items() for index in indices}


def _kinds(model: nn.Module, item: BlockList) -> list[tuple[object, ...]]:
    """Return what tells the blocks of a list apart: their tensors, and the kinds they are given."""
    given = [
        value
        for holder in _holders_of_settings(model, item)
        for name, value in vars(holder).items()
        if not _is_of_others(name, item) and _are_names(value, item.num_blocks)
    ]
    return [
        (
            *(
                name
                for path in item.paths
                for name, _ in model.get_submodule(f"{path}.{i}").named_parameters()
            ),
            *(names[i] for names in given),
        )
        for i in range(item.num_blocks)
    ]


def _are_names(value: Any, number: int) -> bool:
    """Say whether a setting names the kind of each block, such as sliding or full attention.

    Names that are all different are no kinds.
    """
    return (
        isinstance(value, list | tuple)
        and all(isinstance(kind, str) for kind in value)
        and len(set(value)) < len(value) == number
    )


def _lending_blocks(model: nn.Module, blocks: Blocks) -> set[int]:
    return {
        index
        for index in range(blocks.num_blocks)
        for _, part in blocks.parts(model, index)
        if any(getattr(module, "store_full_length_kv", False) for module in part.modules())
    }


def _sharing_blocks(model: nn.Module, blocks: Blocks) -> set[int]:
    """Return the blocks that have a parameter in common with another block."""
    holders: dict[int, set[int]] = {}
    for index in range(blocks.num_blocks):
        for _, part in blocks.parts(model, index):
            for parameter in part.parameters():
                holders.setdefault(id(parameter), set()).add(index)
    return {index for sharing in holders.values() if len(sharing) > 1 for index in sharing}


@contextmanager
def only_blocks(model: nn.Module, blocks: Blocks, kept: Sequence[int]) -> Iterator[None]:
    """Leave only some blocks in a network for a while; no weight is copied.

    Args:
        model: The full model; it is whole again afterwards.
        blocks: Its blocks.
        kept: Indices of the blocks to keep, rising.

    Raises:
        SplitError: If the indices are not rising, are no blocks, or leave a list without any.
    """
    undo = cut_in_place(model, blocks, kept)
    try:
        yield
    finally:
        undo()


def cut_in_place(model: nn.Module, blocks: Blocks, kept: Sequence[int]) -> Callable[[], None]:
    """Take all but some blocks out of a network, and return what puts them back.

    Raises:
        SplitError: If the indices are not rising, are no blocks, or leave a list without any.
    """
    blocks.select(kept)
    undo: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for item, members in blocks.members(kept):
        for path in item.paths:
            parent, _, name = path.rpartition(".")
            owner, whole = model.get_submodule(parent), model.get_submodule(path)
            change(owner, name, _sublist(whole, members))
        for holder in _holders_of_settings(model, item):
            for name, value in _cut_settings(holder, item, members).items():
                change(holder, name, value)
        for owner, name, value in _cut_tables(model, item, members):
            change(owner, name, value)
        for owner, name, value in _cut_indices(model, item, members):
            change(owner, name, value)

    def put_back() -> None:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)

    return put_back


def build_from_blocks(model: Network, blocks: Blocks, kept: Sequence[int]) -> Network:
    """Return a new network that holds only some blocks and shares no memory with the old one.

    Only what is kept is copied, so that a second full model is never in memory.

    Args:
        model: The full model.
        blocks: Its blocks.
        kept: Indices of the blocks to keep, rising.

    Raises:
        SplitError: If the indices are not rising, are no blocks, or leave a list without any.
    """
    with only_blocks(model, blocks, kept):
        small = copy.deepcopy(model)
    return frozen(small, next(model.parameters()).device)


def borrow_blocks(model: Network, blocks: Blocks, kept: Sequence[int]) -> Network:
    """Return a new network that holds only some blocks, its parameters in the old one's memory.

    A module or parameter of it may be replaced as if it were a copy. Whoever writes into one gives
    it memory of its own first: ``parameter.data = parameter.data.clone()``.

    Args:
        model: The full model.
        blocks: Its blocks.
        kept: Indices of the blocks to keep, rising.

    Raises:
        SplitError: If the indices are not rising, are no blocks, or leave a list without any.
    """
    with only_blocks(model, blocks, kept):
        # what deepcopy is told that it has copied already, by the id of the original
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), False) for p in model.parameters()
        }
        small = copy.deepcopy(model, shared)
    return frozen(small, next(model.parameters()).device)


def skeleton(
    class_name: str,
    settings: Mapping[str, Any],
    blocks: Blocks,
    kept: Sequence[int],
    dtype: torch.dtype,
    *,
    layers: Sequence[LayerSpec] = (),
) -> transformers.PreTrainedModel:
    """Return a network with some blocks of a full model and no values in its parameters yet.

    The full model's own weights are never allocated, only those of the kept blocks.

    Args:
        class_name: Class of the network in transformers, e.g. "LlamaForCausalLM".
        settings: The full model's configuration.
        blocks: The full model's blocks.
        kept: Indices of the blocks to keep, rising.
        dtype: Type of the parameters.
        layers: What was done to layers of the kept blocks and to those outside.

    Raises:
        SplitError: If transformers has no such network, or it has other blocks or layers.
    """
    kind = getattr(transformers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise SplitError(f"transformers has no network {class_name!r}")
    used = {k: v for k, v in settings.items() if k not in {"architectures", "transformers_version"}}
    decoded = transformers.PretrainedConfig._decode_special_floats(used)  # noqa: SLF001 - as its own reader does
    config = transformers.AutoConfig.for_model(**decoded)
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: transformers.PreTrainedModel = kind._from_config(config, dtype=dtype)  # noqa: SLF001 - there is no public name
    model.tie_weights()  # which emptying undid
    cut_in_place(model, blocks, kept)
    replace_layers(model, layers)
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, meta in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(meta) not in filled:
                filled[id(meta)] = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype))
            module.register_parameter(name, filled[id(meta)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                if name in module._non_persistent_buffers_set:  # noqa: SLF001 - there is no public name
                    raise SplitError(
                        f"{class_name} keeps {name}, made of its weights, in no file; an emulator "
                        "of it cannot be rebuilt"
                    )
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    return model


def frozen(model: Network, device: torch.device) -> Network:
    """Return the same network on a device, in evaluation mode, with no parameter to train."""
    nn.Module.to(model, device=device)
    model.eval()
    model.requires_grad_(False)
    return model


def _sublist(whole: nn.Module, members: Sequence[int]) -> nn.Module:
    """Return a list of the same class with some members."""
    modules = list(whole.children())
    smaller = copy.copy(whole)
    smaller.__dict__["_modules"] = {str(new): modules[old] for new, old in enumerate(members)}
    return smaller


def _holders_of_settings(model: nn.Module, item: BlockList) -> list[Any]:
    """Return the modules that a list is in, and their configurations, each once.

    What is outside of a stage counts stages, not blocks.
    """
    names = item.paths[0].split(".")
    stage = max((place for place, name in enumerate(names[:-1], 1) if name.isdigit()), default=0)
    holders: dict[int, Any] = {}
    for depth in range(stage, len(names)):
        module = model.get_submodule(".".join(names[:depth]))
        config = None if stage else getattr(module, "config", None)
        for holder in (module, config):
            if isinstance(holder, nn.Module | transformers.PretrainedConfig):
                holders[id(holder)] = holder
    return list(holders.values())


def _is_of_others(name: str, item: BlockList) -> bool:
    """Say whether a setting is internal, or about the other half of an encoder-decoder."""
    other = _other_half(item.paths[0])
    return name.startswith("_") or name == "architectures" or bool(other and other in name)


def _cut_settings(holder: Any, item: BlockList, members: Sequence[int]) -> dict[str, Any]:
    """Return the settings that say how many blocks there are, and what each is, for those kept."""
    cut: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if _is_of_others(name, item):
            continue
        if isinstance(value, int) and value == item.num_blocks and _COUNT.search(name):
            cut[name] = len(members)
        elif isinstance(value, list | tuple) and len(value) == item.num_blocks:
            cut[name] = [value[i] for i in members]
        elif _WHICH.search(name) and _are_indices(value, item.num_blocks):
            cut[name] = [members.index(i) for i in value if i in members]
    return cut


def _are_indices(value: Any, below: int) -> bool:
    """Say whether a setting lists some of the blocks, such as those with cross-attention."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < below for i in value)
        and len(set(value)) == len(value)
    )


def _cut_tables(
    model: nn.Module, item: BlockList, members: Sequence[int]
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the parameters outside the blocks that have a part for each block, cut to those kept.

    Gemma 3n and 4 embed each token anew for every block; this table says where.
    """
    parent = model.get_submodule(item.paths[0].rpartition(".")[0])
    for path, dimension in _TABLES_OF_BLOCKS.items():
        owner_path, _, name = path.rpartition(".")
        owner = dict(parent.named_modules()).get(owner_path)
        if owner is None:
            continue
        table = getattr(owner, name)
        pieces = table.detach().chunk(item.num_blocks, dim=dimension)
        yield owner, name, nn.Parameter(torch.cat([pieces[i] for i in members], dim=dimension))


_TABLES_OF_BLOCKS = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}


def _other_half(path: str) -> str | None:
    if "encoder" in path.split("."):
        return "decoder"
    return "encoder" if "decoder" in path.split(".") else None


def index_attributes(block: nn.Module, index: int) -> list[tuple[nn.Module, str]]:
    """Return where a block and its parts keep the block's own index, which the cache goes by."""
    return [
        (module, name)
        for module in block.modules()
        for name, value in vars(module).items()
        if _INDEX.match(name) and value == index and not isinstance(value, bool)
    ]


def _cut_indices(
    model: nn.Module, item: BlockList, members: Sequence[int]
) -> list[tuple[nn.Module, str, Any]]:
    """Return where the kept blocks, already at their new places, keep indices, and the new ones.

    A block and its parts keep its own, which the cache goes by; a block that runs at several places
    (Zamba 2) keeps a table by index.
    """
    cut: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
    for place, old in enumerate(members):
        for path in item.paths:
            block = model.get_submodule(f"{path}.{place}")
            for module, name in index_attributes(block, old):
                cut[id(module), name] = module, name, place
            for module in block.modules():
                for name, value in vars(module).items():
                    if _BY_INDEX.match(name) and isinstance(value, dict):
                        by_place = {members.index(i): v for i, v in value.items() if i in members}
                        cut[id(module), name] = module, name, by_place
    return list(cut.values())
