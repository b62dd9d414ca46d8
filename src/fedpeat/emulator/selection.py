"""Which blocks an emulator keeps: a table of choices, and what all of them respect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fedpeat.config.recipe import Step
from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch, require_text
from fedpeat.emulator.cka import select_by_cka
from fedpeat.emulator.greedy import select_greedily
from fedpeat.emulator.influence import select_by_influence
from fedpeat.emulator.layer_drop import select_evenly
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import only_blocks, required_blocks
from fedpeat.model.modes import evaluating

__all__ = ["SELECTIONS", "choose_blocks", "choose_rungs", "needs_text"]

Select = Callable[[nn.Module, Blocks, Sequence[int], int, Sequence[Batch]], list[int]]

SELECTIONS: dict[str, Select] = {
    "layer_drop": select_evenly,
    "influence": select_by_influence,
    "greedy": select_greedily,
    "cka": select_by_cka,
}


def needs_text(step: Step) -> bool:
    """Say whether a choice looks at text."""
    return step.name not in {"full", "layer_drop"}


def choose_blocks(
    step: Step,
    model: nn.Module,
    blocks: Blocks,
    tuned: Sequence[int],
    batches: Sequence[Batch],
) -> list[int]:
    """Return all blocks of an emulator: tuned and required ones, and a share of the others.

    Each list of a network (an encoder's, a decoder's, a stage's) gives up the same share.

    Args:
        step: A recipe's first step, which names the choice and the share to keep, rounded down, but
            never to none.
        model: The full model, frozen.
        blocks: Its blocks.
        tuned: Blocks that are kept whatever the share.
        batches: Text that the choice looks at.

    Raises:
        EmulatorError: If there is nothing to compress, or no text to look at.
    """
    everything = list(range(blocks.num_blocks))
    if step.name == "full" or step.value == 1:
        return everything
    if needs_text(step):
        require_text(str(step), batches, ", or use layer_drop")
    with evaluating(model):
        kept = {*tuned, *required_blocks(model, blocks, batches[0] if batches else None)}
        if len(kept) == blocks.num_blocks:
            raise EmulatorError(
                f"there are no blocks to compress: {len(set(tuned))} of {blocks.num_blocks} are "
                f"tuned and the architecture needs the others; tune fewer blocks"
            )
        for candidates in _candidates(blocks, kept):
            number, select = _number_kept(step, candidates), SELECTIONS[step.name]
            kept.update(select(model, blocks, candidates, number, batches))
        if len(kept) == blocks.num_blocks:
            raise EmulatorError(
                f"there are no blocks to compress: {step} leaves all {blocks.num_blocks}, since it "
                "keeps one of those free to go; tune fewer blocks, or take a deeper model"
            )
    return sorted(kept)


def choose_rungs(
    steps: Sequence[Step],
    model: nn.Module,
    blocks: Blocks,
    tuned: Sequence[int],
    batches: Sequence[Batch],
) -> list[list[int]]:
    """Return the blocks of each emulator of a ladder: those of a rung are among the last one's.

    A rung is chosen from the network that the rung above it is.

    Args:
        steps: A choice for each rung, the largest share first.
        model: The full model, frozen.
        blocks: Its blocks.
        tuned: Blocks that are kept whatever the share.
        batches: Text that the choices look at.

    Raises:
        EmulatorError: As ``choose_blocks``, or if a rung would be the one above it.
    """
    rungs = [choose_blocks(steps[0], model, blocks, tuned, batches)]
    with evaluating(model):
        fixed = {*tuned, *required_blocks(model, blocks, batches[0] if batches else None)}
        for step in steps[1:]:
            with only_blocks(model, blocks, rungs[-1]):
                kept = _choose_among(rungs[-1], fixed, step, model, blocks, batches)
            if kept == rungs[-1]:
                raise EmulatorError(
                    f"emulator.lower_rungs: {step} keeps as many blocks as the rung above it, "
                    f"{len(kept)} of {blocks.num_blocks}; leave one of the two out"
                )
            rungs.append(kept)
    return rungs


def _choose_among(
    above: Sequence[int],
    fixed: set[int],
    step: Step,
    model: nn.Module,
    blocks: Blocks,
    batches: Sequence[Batch],
) -> list[int]:
    """Return the blocks of a rung, chosen in a network that has those of the rung above it."""
    kept, select = {i for i in above if i in fixed}, SELECTIONS[step.name]
    for candidates in _candidates(blocks, fixed):
        places = [place for place, index in enumerate(above) if index in candidates]
        number = min(_number_kept(step, candidates), len(places))
        if number < len(places):
            places = select(model, blocks.select(above), places, number, batches)
        kept.update(above[place] for place in places)
    return sorted(kept)


def _candidates(blocks: Blocks, kept: set[int]) -> list[list[int]]:
    """Return the blocks of each list that may be dropped, for lists that have such."""
    lists = [range(start, start + item.num_blocks) for item, start in blocks.starts]
    candidates = [[i for i in members if i not in kept] for members in lists]
    return [own for own in candidates if own]


def _number_kept(step: Step, candidates: Sequence[int]) -> int:
    return max(1, int(step.value * len(candidates) + 1e-9))
