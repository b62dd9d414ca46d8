"""Find the stack of blocks in a network, and build a smaller network from some of its blocks.

No architecture is named here: the block list is the outermost ``ModuleList`` that holds the most
parameters and is as long as the configuration says.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from fedpeat.core.errors import SplitError

__all__ = ["Blocks", "build_from_blocks", "find_blocks", "frozen", "num_blocks_config", "reindex"]


@dataclass(frozen=True)
class Blocks:
    """Where a network keeps its blocks.

    Attributes:
        path: Dotted name of the block list, e.g. "model.layers".
        num_blocks: Length of the list.
    """

    path: str
    num_blocks: int

    def prefix(self, index: int) -> str:
        """Return the dotted name of one block."""
        return f"{self.path}.{index}"

    def of(self, model: nn.Module) -> nn.ModuleList:
        """Return the block list of a model."""
        return model.get_submodule(self.path)  # type: ignore[return-value]


def find_blocks(model: nn.Module) -> Blocks:
    """Return the block list of a network.

    Raises:
        SplitError: If it has none, or only lists that do not fit its configuration.
    """
    outermost = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and not re.search(r"\.\d+(\.|$)", path)
    ]
    expected = _num_hidden_layers(model)
    fitting = [(path, m) for path, m in outermost if expected is None or len(m) == expected]
    if not fitting:
        found = ", ".join(f"{path} ({len(m)})" for path, m in outermost) or "none"
        raise SplitError(
            f"{type(model).__name__} has no list of blocks to cut; wanted a ModuleList of "
            f"{expected if expected is not None else 'blocks'}, found: {found}"
        )
    path, blocks = max(fitting, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return Blocks(path, len(blocks))


def reindex(names: Sequence[str], path: str, index_map: Mapping[int, int]) -> dict[str, str]:
    """Map tensor names of one network to those of another with its blocks at other places.

    Args:
        names: Tensor names, e.g. "model.layers.4.mlp.up_proj.weight".
        path: Dotted name of the block list.
        index_map: New index of each block that the other network has.

    Returns:
        New name of each name; a name in a block that the other network lacks is left out.
    """
    pattern = re.compile(rf"(^|\.){re.escape(path)}\.(\d+)(?=\.|$)")
    mapping = {}
    for name in names:
        match = pattern.search(name)
        if match is None:
            mapping[name] = name
        elif int(match[2]) in index_map:
            start, end = match.span(2)
            mapping[name] = f"{name[:start]}{index_map[int(match[2])]}{name[end:]}"
    return mapping


def build_from_blocks(
    model: transformers.PreTrainedModel, blocks: Blocks, kept: Sequence[int]
) -> transformers.PreTrainedModel:
    """Return a new network that holds only some blocks and shares no memory with the old one.

    Args:
        model: The full model.
        blocks: Its block list.
        kept: Indices of the blocks to keep, rising.

    Raises:
        SplitError: If the indices are not rising, not in range, or the architecture cannot be built
            with them.
    """
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= blocks.num_blocks:
        raise SplitError(
            f"kept blocks must be rising indices below {blocks.num_blocks}, got {list(kept)}"
        )
    config = num_blocks_config(model.config, blocks.num_blocks, kept)
    weight = next(model.parameters())
    attention = model.config._attn_implementation  # noqa: SLF001 - there is no public name
    with torch.random.fork_rng(devices=[]):  # throw-away initial weights: leave the caller's stream
        small = type(model)._from_config(  # noqa: SLF001
            config, dtype=weight.dtype, attn_implementation=attention
        )
    state = model.state_dict()
    new_names = reindex(list(state), blocks.path, {old: new for new, old in enumerate(kept)})
    try:
        small.load_state_dict({new: state[old].detach().clone() for old, new in new_names.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SplitError(
            f"{type(model).__name__} cannot be built with blocks {list(kept)}: {reason}"
        ) from error
    small.tie_weights()
    return frozen(small, weight.device)


def frozen(
    model: transformers.PreTrainedModel, device: torch.device
) -> transformers.PreTrainedModel:
    """Return the same network on a device, in evaluation mode, with no parameter to train."""
    nn.Module.to(model, device=device)
    model.eval()
    model.requires_grad_(False)
    return model


def num_blocks_config(
    config: transformers.PretrainedConfig, num_blocks: int, kept: Sequence[int]
) -> transformers.PretrainedConfig:
    """Return a copy of a configuration for the kept blocks, per-block settings included."""
    small = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == num_blocks and key != "architectures":
            setattr(small, key, [value[i] for i in kept])
    small.num_hidden_layers = len(kept)
    small._name_or_path = ""  # noqa: SLF001 - where the owner keeps the model is nobody's business
    return small


def _num_hidden_layers(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    number = getattr(config, "num_hidden_layers", None)
    return number if isinstance(number, int) else None
