"""A document, and who owns which documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Corpus", "Document", "FederatedDocuments"]


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

    @property
    def num_characters(self) -> int:
        return len(self.prompt) + len(self.text)


@dataclass(frozen=True)
class Corpus:
    """What a source gives: documents to share out, and the splits that the source has by itself.

    A split that is None is still to be held out from ``documents``.
    """

    documents: Sequence[Document]
    server: Sequence[Document] | None = None
    validation: Sequence[Document] | None = None
    test: Sequence[Document] | None = None


@dataclass(frozen=True)
class FederatedDocuments:
    """Disjoint documents of every client, of the server and of the held-out splits."""

    clients: dict[str, tuple[Document, ...]]
    server: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
