"""Take blocks out of a network: for a while, in a copy, or in one built from its settings."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import BlockList, Blocks
from fedpeat.model.layers import LayerSpec, replace_layers

__all__ = [
    "build_from_blocks",
    "cut_in_place",
    "frozen",
    "index_attributes",
    "only_blocks",
    "required_blocks",
    "skeleton",
]

Network = TypeVar("Network", bound=nn.Module)

_COUNT = re.compile(r"layers?$|^num_blocks$")
_WHICH = re.compile(r"layers?$|layers?_(ids?|idxs?|indices)$")
_INDEX = re.compile(r"^(layer|block)_(idx|id|index|number)$")


def required_blocks(
    model: nn.Module, blocks: Blocks, batch: Mapping[str, torch.Tensor] | None = None
) -> list[int]:
    """Return the blocks that nothing can stand in for.

    These are the only ones of their kind in their list (the first block of T5, which computes the
    position bias of all others; the one attention layer of a hybrid stack; the dense layer before
    the experts), and those that share weights with another block, or keep the keys and values that
    later blocks read (Gemma 3n and 4). A traced call shows those that change the shape of what
    passes through them (the first of a stage of a convolutional network).

    Args:
        model: The full model.
        blocks: Its blocks.
        batch: Inputs to trace a call with; without them shapes are not looked at.
    """
    required = []
    for item, start in blocks.starts:
        kinds = [
            tuple(
                name
                for path in item.paths
                for name, _ in model.get_submodule(f"{path}.{i}").named_parameters()
            )
            for i in range(item.num_blocks)
        ]
        counts = Counter(kinds)
        if len(counts) > 1:
            required += [start + i for i, kind in enumerate(kinds) if counts[kind] == 1]
    return sorted(
        {
            *required,
            *_sharing_blocks(model, blocks),
            *_lending_blocks(model, blocks),
            *(_reshaping_blocks(model, blocks, batch) if batch is not None else ()),
        }
    )


def _reshaping_blocks(
    model: nn.Module, blocks: Blocks, batch: Mapping[str, torch.Tensor]
) -> set[int]:
    """Return the blocks whose output has another shape than their input, by a traced call."""
    reshaping: set[int] = set()

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            came, left = _first_tensor(inputs), _first_tensor(output)
            if came is not None and left is not None and came.shape != left.shape:
                reshaping.add(index)

        return hook

    handles = [
        blocks.parts(model, index)[0][1].register_forward_hook(watch(index))
        for index in range(blocks.num_blocks)
        if len(blocks.names(index)) == 1
    ]
    try:
        with torch.inference_mode():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return reshaping


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value
    if not isinstance(items, Iterable):
        return None
    return next((item for item in items if isinstance(item, torch.Tensor)), None)


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
        for place, old in enumerate(members):
            for path in item.paths:
                for module, name in index_attributes(model.get_submodule(f"{path}.{place}"), old):
                    change(module, name, place)

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
    """Return the modules that a list is in, and their configurations, each once."""
    names = item.paths[0].split(".")
    holders: dict[int, Any] = {}
    for depth in range(len(names)):
        module = model.get_submodule(".".join(names[:depth]))
        config = getattr(module, "config", None)
        for holder in (module, config):
            if isinstance(holder, nn.Module | transformers.PretrainedConfig):
                holders[id(holder)] = holder
    return list(holders.values())


def _cut_settings(holder: Any, item: BlockList, members: Sequence[int]) -> dict[str, Any]:
    """Return the settings that say how many blocks there are, and what each is, for those kept."""
    other = _other_half(item.paths[0])
    cut: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if name.startswith("_") or name == "architectures" or (other and other in name):
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
