"""What passes through the blocks of a network in one call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import Blocks

__all__ = [
    "BlockCall",
    "block_calls",
    "check_chain",
    "reshaping_blocks",
    "states_after",
    "tensors_in",
]

Inputs = Mapping[str, Any]
"""What a network is called with, by name."""


@dataclass(frozen=True)
class BlockCall:
    """The first call of a block while the network is called once.

    Attributes:
        entered: Tensors that the block was given, in order; its hidden states come first.
        left: Tensors that it gave, in order; its hidden states come first.
    """

    entered: tuple[Tensor, ...]
    left: tuple[Tensor, ...]

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Return the hidden states before and after the block.

        Raises:
            SplitError: If it takes or gives no tensor.
        """
        if not (self.entered and self.left):
            raise SplitError("a block takes or gives no tensor, so it has no hidden states")
        return self.entered[0], self.left[0]


def block_calls(
    model: nn.Module, blocks: Blocks, indices: Iterable[int], inputs: Inputs
) -> dict[int, BlockCall]:
    """Return what enters and what leaves some blocks in one call of a network.

    Args:
        model: The network.
        blocks: Its blocks.
        indices: Blocks to watch.
        inputs: Inputs of the call.

    Returns:
        Calls by block; a block that did not run has none.
    """
    entered: dict[int, tuple[Tensor, ...]] = {}
    calls: dict[int, BlockCall] = {}

    def enter(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            entered.setdefault(index, tuple(tensors_in([args, kwargs])))

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            calls.setdefault(index, BlockCall(entered[index], tuple(tensors_in(output))))

        return hook

    handles = []
    for index in indices:
        parts = blocks.parts(model, index)
        handles.append(parts[0][1].register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(parts[-1][1].register_forward_hook(leave(index)))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def states_after(blocks: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect the hidden states that leave some blocks, those of the last call of each."""
    states: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: object, output: Any) -> None:
        states[module] = next(tensors_in(output))

    handles = [block.register_forward_hook(keep) for block in dict.fromkeys(blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def reshaping_blocks(model: nn.Module, blocks: Blocks, inputs: Inputs) -> set[int]:
    """Return the blocks whose output has another shape than their input, by a traced call."""
    single = [i for i in range(blocks.num_blocks) if len(blocks.names(i)) == 1]
    with torch.inference_mode():
        calls = block_calls(model, blocks, single, inputs)
    return {
        index
        for index, made in calls.items()
        if made.entered and made.left and made.entered[0].shape != made.left[0].shape
    }


def check_chain(model: nn.Module, blocks: Blocks, inputs: Inputs) -> None:
    """Check by a traced call that what one block gives, the next one of its list takes.

    Where the parts of a block are in lists side by side, it is only checked that they run.

    Raises:
        SplitError: If a block does not run, or does not take what the one before it gives.
    """
    with torch.inference_mode():
        calls = block_calls(model, blocks, range(blocks.num_blocks), inputs)
    for item, start in blocks.starts:
        for index in range(start, start + item.num_blocks):
            name = blocks.names(index)[-1]
            if index not in calls:
                raise SplitError(
                    f"blocks must run one after the other: {name} does not run for these inputs; "
                    "give inputs that it runs for, or name another list with blocks"
                )
            side_by_side = len(item.paths) > 1
            if (
                index > start
                and not side_by_side
                and not _passed_on(calls[index - 1].left, calls[index].entered)
            ):
                raise SplitError(
                    f"blocks must form a chain: what {blocks.names(index - 1)[-1]} gives does not "
                    f"enter {name}; name a list whose members run one after the other with blocks"
                )


def _passed_on(left: Sequence[Tensor], entered: Sequence[Tensor]) -> bool:
    """Say whether some tensor is among both, itself or its values."""
    return any(a is b or (a.shape == b.shape and torch.equal(a, b)) for a in left for b in entered)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
