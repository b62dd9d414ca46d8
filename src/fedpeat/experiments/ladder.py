"""A ladder of emulators in one network: a rung is the network without the blocks that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import only_blocks
from fedpeat.model.layers import LayerSpec
from fedpeat.tuning.distillation import Pair

__all__ = ["Ladder"]


@dataclass(frozen=True)
class Ladder:
    """The full model and its largest emulator, of which the smaller ones are parts.

    Attributes:
        teacher: The full model.
        student: The largest emulator.
        blocks: The full model's blocks.
        kept: Index in the full model of each block of a rung, by its name, the largest first.
        tuned: Blocks of the adapter, which stay as they are; empty if it sits on every kept block.
    """

    teacher: nn.Module
    student: nn.Module
    blocks: Blocks
    kept: Mapping[str, Sequence[int]]
    tuned: Collection[int]

    @property
    def largest(self) -> Sequence[int]:
        """Index in the full model of each block of the largest emulator."""
        return next(iter(self.kept.values()))

    @property
    def own(self) -> Blocks:
        """Blocks of the largest emulator."""
        return self.blocks.select(self.largest)

    @property
    def middle(self) -> list[int]:
        """Places in the largest emulator of the blocks that are not tuned."""
        return [place for place, index in enumerate(self.largest) if index not in self.tuned]

    @contextmanager
    def rung(self, name: str) -> Iterator[Pair]:
        """Make the network a rung for a while, paired with the full model."""
        own, places = self.own, [self.largest.index(i) for i in self.kept[name]]
        with only_blocks(self.student, own, places):
            yield Pair(self.teacher, self.student, self._meetings(self.kept[name]))

    def _meetings(self, kept: Sequence[int]) -> list[tuple[nn.Module, nn.Module]]:
        """Pair each kept block of the middle with the last of the blocks that it stands in for."""
        blocks, own = self.blocks, self.blocks.select(kept)
        ends = {start + item.num_blocks for item, start in blocks.starts}
        middle = [place for place, index in enumerate(kept) if index not in self.tuned]
        meetings = []
        for place in middle or [len(kept) - 1]:
            end = next(end for end in sorted(ends) if end > kept[place])
            following = kept[place + 1] if place + 1 < len(kept) else end
            last = min(following, end) - 1
            meetings.append((blocks.output(self.teacher, last), own.output(self.student, place)))
        return meetings

    @property
    def rungs(self) -> list[Callable[[], AbstractContextManager[Pair]]]:
        """What makes the network each of the rungs for a while, the largest first."""
        return [partial(self.rung, name) for name in self.kept]

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of the middle; to be asked for while the network is whole."""
        return [
            parameter
            for place in self.middle
            for _, part in self.own.parts(self.student, place)
            for parameter in part.parameters()
        ]

    def specs_of(self, name: str, layers: Sequence[LayerSpec]) -> list[LayerSpec]:
        """Return what was done to layers of the largest emulator, for those that a rung has."""
        kept = self.kept[name]
        places = {self.largest.index(index): place for place, index in enumerate(kept)}
        names = self.own.rename([spec.name for spec in layers], self.blocks.select(kept), places)
        return [replace(spec, name=names[spec.name]) for spec in layers if spec.name in names]
