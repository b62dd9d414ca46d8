"""Holding documents out: validation, test and the server's share, before anything is shared out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from fedpeat.data.documents import Owned, Shared_co

__all__ = ["HeldOut", "generator", "group_by_key", "hold_out", "split_counts"]


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a generator of its own for each seed and purpose, the same in every process."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def group_by_key(documents: Sequence[Owned]) -> dict[str, list[Owned]]:
    """Return the documents of each key, keys in the order of their first document."""
    groups: dict[str, list[Owned]] = {}
    for document in documents:
        groups.setdefault(document.key, []).append(document)
    return groups


@dataclass(frozen=True)
class HeldOut(Generic[Shared_co]):
    """Disjoint parts that together are all documents, each in the documents' own order."""

    validation: tuple[Shared_co, ...]
    test: tuple[Shared_co, ...]
    server: tuple[Shared_co, ...]
    rest: tuple[Shared_co, ...]


def split_counts(num_documents: int, ratios: Sequence[float]) -> list[int]:
    """Return how many documents each ratio holds out.

    The share is rounded down, but a ratio above 0 gets at least one document as long as one is left
    over for the rest; the first ratios go first.
    """
    counts = []
    left = num_documents
    for ratio in ratios:
        # The tiny term keeps 0.29 * 100 from being 28.
        wanted = max(1, int(num_documents * ratio + 1e-9)) if ratio > 0 else 0
        counts.append(max(0, min(wanted, left - 1)))
        left -= counts[-1]
    return counts


def hold_out(
    documents: Sequence[Owned],
    *,
    validation_ratio: float,
    test_ratio: float,
    server_ratio: float,
    by_key: bool,
    seed: int,
) -> HeldOut[Owned]:
    """Draw the held-out documents.

    Args:
        documents: All documents.
        validation_ratio: Share of documents for validation.
        test_ratio: Share of documents for the test.
        server_ratio: Share of documents for the server.
        by_key: Whether to draw from each key apart, so that every owner contributes and the draw
            from one owner does not depend on the others.
        seed: Seed of the draw.
    """
    ratios = (validation_ratio, test_ratio, server_ratio)
    parts: tuple[list[Owned], ...] = ([], [], [], [])
    groups = group_by_key(documents) if by_key else {"": list(documents)}
    for key, group in groups.items():
        order = generator(seed, f"hold out:{key}").permutation(len(group))
        borders = np.cumsum(split_counts(len(group), ratios))
        for part, chosen in zip(parts, np.split(order, borders), strict=True):
            part.extend(group[index] for index in np.sort(chosen))
    return HeldOut(*map(tuple, parts))
