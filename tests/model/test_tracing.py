"""What a traced call shows: what passes through blocks, and that they form a chain."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fedpeat.core.errors import SplitError
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.model.tracing import block_calls, check_chain, reshaping_blocks


class Network(nn.Module):
    """Three linear blocks, run in some way."""

    def __init__(self, way: str = "chain", widths: tuple[int, ...] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        if self.way == "side by side":
            return torch.stack([first(x), second(x), third(x)]).sum(0)
        if self.way == "one left out":
            return third(first(x))  # type: ignore[no-any-return]
        if self.way == "copied":
            return third(second(first(x).clone()).clone())  # type: ignore[no-any-return]
        if self.way == "twice":
            x = third(second(first(x))) + 1
        return third(second(first(x)))  # type: ignore[no-any-return]


INPUTS = {"x": torch.tensor([[1.0, 2.0]])}


def traced(network: Network) -> tuple[Network, Blocks]:
    return network, find_blocks(network)


def test_what_enters_and_leaves_a_block_is_seen() -> None:
    network, blocks = traced(Network())
    calls = block_calls(network, blocks, [0, 2], INPUTS)
    first, last = calls[0].states, calls[2].states
    assert calls.keys() == {0, 2}
    assert first[0] is INPUTS["x"]
    torch.testing.assert_close(first[1], network.blocks[0](INPUTS["x"]))
    torch.testing.assert_close(last[1], network(**INPUTS))


def test_of_a_block_that_runs_twice_the_first_time_is_seen() -> None:
    network, blocks = traced(Network("twice"))
    assert block_calls(network, blocks, [0], INPUTS)[0].states[0] is INPUTS["x"]


def test_network_is_as_before_after_a_traced_call() -> None:
    network, blocks = traced(Network())
    block_calls(network, blocks, range(3), INPUTS)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in network.modules()]  # noqa: SLF001
    assert not any(hooks)


@pytest.mark.parametrize("way", ["chain", "copied", "twice"])
def test_blocks_that_pass_on_what_they_give_form_a_chain(way: str) -> None:
    check_chain(*traced(Network(way)), INPUTS)


def test_blocks_side_by_side_are_refused_with_what_would_work() -> None:
    message = (
        "blocks must form a chain: what blocks.0 gives does not enter blocks.1; name a list whose "
        "members run one after the other with blocks"
    )
    with pytest.raises(SplitError, match=message):
        check_chain(*traced(Network("side by side")), INPUTS)


def test_block_that_does_not_run_is_named() -> None:
    with pytest.raises(SplitError, match="blocks.1 does not run for these inputs; give inputs"):
        check_chain(*traced(Network("one left out")), INPUTS)


def test_blocks_that_change_the_shape_are_found() -> None:
    network, blocks = traced(Network(widths=(2, 4, 4, 3)))
    assert reshaping_blocks(network, blocks, INPUTS) == {0, 2}
