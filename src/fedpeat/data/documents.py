"""A document, and who owns which documents (or images, or whatever else has an owner)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

__all__ = ["Corpus", "Document", "FederatedDocuments", "Item", "Owned"]


@runtime_checkable
class Item(Protocol):
    """What is held out and shared out as a whole: a document, or an image."""

    plural: ClassVar[str]
    """What several are called in messages."""

    @property
    def key(self) -> str:
        """The natural owner; empty if there is none."""

    @property
    def label(self) -> str:
        """The label that a Dirichlet partition skews; empty if there is none."""

    @property
    def size(self) -> int:
        """How much it adds to what its owner has."""


Owned = TypeVar("Owned", bound=Item)
Shared_co = TypeVar("Shared_co", bound=Item, covariant=True)


@dataclass(frozen=True)
class Document:
    """A piece of text that is never cut between owners or splits.

    Attributes:
        text: The text to learn.
        key: The natural owner (speaker, hospital, file name, ...); empty if there is none.
        label: The label that a Dirichlet partition skews; empty if there is none.
        prompt: Text shown before ``text`` and left out of the loss.
    """

    text: str
    key: str = ""
    label: str = ""
    prompt: str = ""

    plural: ClassVar[str] = "documents"

    @property
    def num_characters(self) -> int:
        return len(self.prompt) + len(self.text)

    @property
    def size(self) -> int:
        return self.num_characters


@dataclass(frozen=True)
class Corpus(Generic[Shared_co]):
    """What a source gives: documents to share out, and the splits that the source has by itself.

    A split that is None is still to be held out from ``documents``.
    """

    documents: Sequence[Shared_co]
    server: Sequence[Shared_co] | None = None
    validation: Sequence[Shared_co] | None = None
    test: Sequence[Shared_co] | None = None


@dataclass(frozen=True)
class FederatedDocuments(Generic[Shared_co]):
    """Disjoint documents of every client, of the server and of the held-out splits."""

    clients: Mapping[str, tuple[Shared_co, ...]]
    server: tuple[Shared_co, ...]
    validation: tuple[Shared_co, ...]
    test: tuple[Shared_co, ...]
