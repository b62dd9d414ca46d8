"""What a participant trains on or is scored on, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64

__all__ = ["IGNORED", "Examples", "FederatedData"]

IGNORED = -100
"""Label of an output that no loss is taken of, as in transformers."""


@runtime_checkable
class Examples(Protocol):
    """Examples in memory, of which batches can be had as a network takes them.

    Budgets and speeds are counted in tokens: those of text, or whole examples where each has one
    label.
    """

    shift: ClassVar[int]
    """Places from an output to the label it is compared with: 1 where the next token is
    predicted."""
    options: ClassVar[Mapping[str, bool]]
    """Further arguments of the network's call."""

    @property
    def num_examples(self) -> int: ...

    @property
    def tokens_per_example(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def inputs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return arguments of the network's call by name, for some examples."""

    def labels(self, rows: np.ndarray) -> Int64[np.ndarray, "*positions"]:
        """Return the class or the tokens of some examples, ``IGNORED`` where none counts."""

    def num_bytes(self, rows: np.ndarray) -> int:
        """Return the bytes of text that the labels of some examples stand for; 0 if no text."""

    def spread(self, n: int) -> Examples:
        """Return ``n`` examples evenly spaced over all, or all if there are fewer."""

    @classmethod
    def concatenate(cls, parts: Sequence[Any]) -> Examples:
        """Return the examples of all parts, which are of one kind, one part after the other."""


Kind_co = TypeVar("Kind_co", bound=Examples, covariant=True)


@dataclass(frozen=True)
class FederatedData(Generic[Kind_co]):
    """Examples of every client, of the server (None without any) and of the held-out splits.

    Attributes:
        clients: Those of each client, by its name.
        server: Those of the server; None if it has none.
        validation: Those that choose the best round.
        test: Those that the result is measured with.
        classes: Name of each class by its number, where examples have classes.
    """

    clients: Mapping[str, Kind_co]
    server: Kind_co | None
    validation: Kind_co
    test: Kind_co
    classes: Mapping[int, str] = field(default_factory=dict)
