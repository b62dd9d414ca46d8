"""How well an attack on privacy did: AUC, hits at few false alarms, and ROUGE. NumPy only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["Separation", "rouge_1", "rouge_l", "separation", "words"]

FALSE_ALARMS = 0.01
_NUM_BOOTSTRAPS = 1000
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Separation:
    """How well a score tells members from others.

    Attributes:
        auc: Chance that a member has the higher score; ties count a half, 0.5 is guessing.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        tpr: Share of the members found with 1 % of false alarms; guessing finds 1 %.
    """

    auc: float
    low: float
    high: float
    tpr: float


def separation(
    members: Float[np.ndarray, " members"], others: Float[np.ndarray, " others"], seed: int
) -> Separation:
    """Return how well scores tell members from others.

    Args:
        members: Scores of those that were trained on.
        others: Scores of those that were not.
        seed: Seed of the bootstrap, which draws members and others anew.

    Source:
        Mann, Whitney (1947) for the AUC; Carlini et al. (2022), Membership inference attacks from
        first principles, for the share at few false alarms.
    """
    rng = np.random.default_rng(seed)
    wins = _wins(members, others)
    rows = rng.integers(0, len(members), (_NUM_BOOTSTRAPS, len(members)))
    columns = rng.integers(0, len(others), (_NUM_BOOTSTRAPS, len(others)))
    drawn = [_mean(wins, r, c) for r, c in zip(rows, columns, strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    # strictly above the highest scores of others but so many as may be false alarms
    allowed = int(FALSE_ALARMS * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return Separation(
        float(wins.mean()), float(low), float(high), float((members > threshold).mean())
    )


def _wins(
    members: Float[np.ndarray, " members"], others: Float[np.ndarray, " others"]
) -> Float[np.ndarray, "members others"]:
    gaps = members[:, None] - others[None, :]
    wins: np.ndarray = (gaps > 0) + 0.5 * (gaps == 0)
    return wins


def _mean(
    wins: Float[np.ndarray, "members others"], rows: np.ndarray, columns: np.ndarray
) -> float:
    """Return the mean over drawn rows and columns, by how often each was drawn."""
    in_rows = np.bincount(rows, minlength=wins.shape[0]) / len(rows)
    in_columns = np.bincount(columns, minlength=wins.shape[1]) / len(columns)
    return float(in_rows @ wins @ in_columns)


def words(text: str) -> list[str]:
    """Return the words and marks of a text."""
    return _WORD.findall(text.lower())


def rouge_1(found: Sequence[str], true: Sequence[str]) -> float:
    """Return the F1 of the words that two texts share, in [0, 1].

    Source:
        Lin (2004), ROUGE: a package for automatic evaluation of summaries.
    """
    return _f1(sum((Counter(found) & Counter(true)).values()), found, true)


def rouge_l(found: Sequence[str], true: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of two texts, in [0, 1]."""
    lengths = np.zeros(len(true) + 1, dtype=np.int64)
    for word in found:
        before = 0
        for place, other in enumerate(true, start=1):
            here = int(lengths[place])
            lengths[place] = before + 1 if word == other else max(here, lengths[place - 1])
            before = here
    return _f1(int(lengths[-1]), found, true)


def _f1(shared: int, found: Sequence[str], true: Sequence[str]) -> float:
    return 2 * shared / (len(found) + len(true)) if shared else 0.0
