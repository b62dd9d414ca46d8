"""Leave out attention heads; where several share keys and values, the whole group of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from operator import itemgetter

import torch
import transformers
from jaxtyping import Int
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch, require_text, second_moment
from fedpeat.emulator.narrowing import (
    Cut,
    Narrowed,
    changing,
    differing,
    inputs_of,
    narrow,
    plain_layers,
    works_narrower,
)
from fedpeat.emulator.width import fit_outgoing, neuron_scores
from fedpeat.model.blocks import Blocks, config_numbers
from fedpeat.model.layers import SIZES, matrix_of
from fedpeat.model.modes import evaluating

__all__ = ["Heads", "heads_of", "leave_out_heads"]

_MOST_SIZES = 2


@dataclass(frozen=True)
class Heads:
    """Heads of a block, or groups of them: each is some rows of the layers before a later one.

    Attributes:
        rows: Rows of each head in the layers before, by their names.
        after: Name of the layer after.
        columns: Columns of each head in it.
    """

    rows: Mapping[str, Int[Tensor, "heads rows"]]
    after: str
    columns: Int[Tensor, "heads columns"]

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.columns)

    def cut(self, kept: Int[Tensor, " kept"]) -> Cut:
        """Return what stays of the layers where only some heads do."""
        rows = {name: own[kept].flatten().sort().values for name, own in self.rows.items()}
        return Cut(rows, self.after, self.columns[kept].flatten())


def leave_out_heads(
    model: nn.Module, blocks: Blocks, indices: Sequence[int], ratio: float, batches: Sequence[Batch]
) -> Narrowed:
    """Keep a share of the attention heads of some blocks, in place, one block after the other.

    What the layer after the heads makes of those that are left is fitted anew. A block that does
    not work with fewer heads keeps all of them.

    Args:
        model: The emulator.
        blocks: Its blocks.
        indices: Blocks that lose heads.
        ratio: Share of heads that is kept, in (0, 1]; at least one stays.
        batches: Text whose activations say which heads matter.

    Returns:
        What was done to each layer, and what is left of it.

    Raises:
        EmulatorError: If there is no text, or no block works with fewer heads.

    Source:
        Michel, Levy, Neubig (2019), Are sixteen heads really better than one?, for heads as what is
        left out; scores and the fit are those of neurons.
    """
    require_text("heads", batches)
    done = Narrowed([], {})
    short = {name: values[:1] for name, values in batches[0].items()}
    for index in indices:
        for after, choices in itertools.groupby(
            heads_of(model, blocks, index, short), key=lambda heads: heads.after
        ):
            layer = model.get_submodule(after)
            moment = second_moment(model, layer, batches)
            scores = neuron_scores(matrix_of(layer), moment)
            for heads in choices:
                number = max(1, int(ratio * heads.number))
                kept = scores[heads.columns].sum(1).topk(number).indices.sort().values.cpu()
                share = Fraction(number, heads.number)
                cut = _working(model, heads.cut(kept), share, blocks.names(index), short)
                if cut is not None:
                    fitted = fit_outgoing(matrix_of(layer), moment, cut.columns)
                    done += narrow(model, cut, fitted)
                    break
    if not done.layers:
        raise EmulatorError(
            f"emulator.recipe heads finds no attention heads that {len(indices)} kept blocks of "
            f"{type(model).__name__} work without; width or dropping blocks would work"
        )
    return done


def heads_of(model: nn.Module, blocks: Blocks, index: int, batch: Batch) -> list[Heads]:
    """Return what may be the heads of a block, found by calls; for each layer after, best first.

    Rows of a layer are heads of a later one if changing those of some heads changes the columns of
    these heads, all of them and no others. Best is what the most layers take part in, in the
    smallest groups. That a block works with fewer is not looked at here.
    """
    layers = plain_layers(model, blocks, index)
    members: dict[tuple[str, int], dict[str, Tensor]] = {}
    with evaluating(model), torch.inference_mode():
        plain = inputs_of(model, layers, batch)
        widths = {after: value.shape[-1] for after, value in plain.items()}
        for name, layer in layers.items():
            for rows in _layouts(matrix_of(layer).shape[0], widths.values(), _numbers(model)):
                some = rows[::3].flatten()
                with changing(layer, partial(_told_apart, rows=some)):
                    changed = inputs_of(model, layers, batch)
                for after, width in widths.items():
                    if width % len(rows) or after not in changed or after == name:
                        continue
                    columns = torch.zeros(width, dtype=torch.bool)
                    columns[_in_order(width, len(rows))[::3]] = True
                    if torch.equal(differing(plain[after], changed[after]), columns):
                        members.setdefault((after, len(rows)), {})[name] = rows
    found = [
        Heads(own, after, _in_order(widths[after], number))
        for (after, number), own in members.items()
        if not own.keys() <= members.get((after, widths[after]), {}).keys()  # those are neurons
    ]
    order = list(widths)
    return sorted(found, key=lambda h: (order.index(h.after), -len(h.rows), -h.number))


def _numbers(model: nn.Module) -> set[int]:
    """Return how many heads, or groups of them, there may be: a number of the configuration."""
    return config_numbers(getattr(model, "config", None)) - {0, 1}


def _layouts(
    num_rows: int, widths: Iterable[int], numbers: Collection[int]
) -> Iterator[Int[Tensor, "heads rows"]]:
    """Yield the rows of each head, in every way in which a layer may hold them.

    Head by head; or, in one layer for all three, the queries of all heads before their keys before
    their values, where keys and values may be fewer. With one row for each column these are
    neurons.
    """
    widths = set(widths)
    for number in sorted({*numbers, *widths}, reverse=True):
        if num_rows % number == 0:
            yield _in_order(num_rows, number)
        for width in widths:
            rest = (num_rows - width) // 2
            parts = (width, rest, rest)
            if 0 < rest <= width and sum(parts) == num_rows and not any(p % number for p in parts):
                starts = itertools.accumulate(parts, initial=0)
                yield torch.cat(
                    [
                        _in_order(part, number) + start
                        for part, start in zip(parts, starts, strict=False)
                    ],
                    dim=1,
                )


def _in_order(length: int, number: int) -> Int[Tensor, "number share"]:
    return torch.arange(length).view(number, -1)


def _told_apart(output: Tensor, rows: Int[Tensor, " rows"]) -> Tensor:
    """Return what a layer puts out with some rows changed, each by a factor of its own.

    What is added to all keys alike, attention does not see, nor would a norm see a common factor.
    """
    factors = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
    factors[rows] = torch.linspace(1.5, 2.5, len(rows)).to(factors)
    return output * factors


def _working(
    model: nn.Module, cut: Cut, share: Fraction, within: Sequence[str], batch: Batch
) -> Cut | None:
    """Return a cut with the new sizes that its modules need to work with it; None if nothing helps.

    Args:
        model: The network.
        cut: What stays of the layers.
        share: Share of the heads that stays.
        within: Names of the modules of the block.
        batch: What to try it on.
    """
    with evaluating(model), torch.inference_mode():
        for sizes in _sizes_to_try(model, cut, share, within):
            tried = replace(cut, sizes=sizes)
            if works_narrower(model, tried, batch):
                with _eager(model):
                    if works_narrower(model, tried, batch):
                        return tried
    return None


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Let attention be computed for a while in the way that asks the most of a module's sizes.

    A fused kernel may work out by itself how many heads share keys; a device may have none.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        yield
        return
    usual = model.config._attn_implementation  # noqa: SLF001 - there is no public name
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _sizes_to_try(
    model: nn.Module, cut: Cut, share: Fraction, within: Sequence[str]
) -> Iterator[dict[str, int]]:
    """Yield new values of attributes, none at first; those of one value change together."""
    owners = {
        ".".join(words[:end])
        for words in (name.split(".") for name in (*cut.rows, cut.after))
        for end in range(1, len(words))
    }
    by_value: dict[int, dict[str, int]] = {}
    for owner in sorted(name for name in owners if name.startswith(tuple(within))):
        for name, value in sorted(vars(model.get_submodule(owner)).items(), key=itemgetter(0)):
            if name in SIZES and type(value) is int and (value * share).denominator == 1:
                by_value.setdefault(value, {})[f"{owner}.{name}"] = int(value * share)
    for number in range(_MOST_SIZES + 1):
        for values in itertools.combinations(sorted(by_value), number):
            yield {name: new for value in values for name, new in by_value[value].items()}
