"""A ladder of emulators in one network: a rung is the network without the blocks that it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import only_blocks
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
    tuned: Sequence[int]

    @property
    def _largest(self) -> Sequence[int]:
        return next(iter(self.kept.values()))

    @contextmanager
    def rung(self, name: str) -> Iterator[Pair]:
        """Make the network a rung for a while, paired with the full model at the middle's end.

        After the last block of the middle both have the same tuned blocks.
        """
        largest, kept = self._largest, self.kept[name]
        own = self.blocks.select(largest)
        middle = [i for i in range(self.blocks.num_blocks) if i not in set(self.tuned)]
        last = max(place for place, index in enumerate(kept) if index <= middle[-1])
        with only_blocks(self.student, own, [largest.index(i) for i in kept]):
            yield Pair(
                self.teacher,
                self.student,
                self.blocks.output(self.teacher, middle[-1]),
                self.blocks.select(kept).output(self.student, last),
            )

    def added(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of the middle that a rung has and the smaller ones have not.

        Trained from the smallest rung up, each with all others frozen, the rungs stay nested. To be
        asked for while the network is whole.
        """
        names = list(self.kept)
        smaller = {i for below in names[names.index(name) + 1 :] for i in self.kept[below]}
        settled = {*smaller, *self.tuned}
        own = self.blocks.select(self._largest)
        return [
            parameter
            for place, index in enumerate(self._largest)
            if index in self.kept[name] and index not in settled
            for _, part in own.parts(self.student, place)
            for parameter in part.parameters()
        ]
