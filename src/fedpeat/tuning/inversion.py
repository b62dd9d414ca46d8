"""Texts read back from an update: those whose loss the update lowers most.

To first order the loss of a text falls along an update by the product of its gradient and the
update, so that looking for texts whose loss falls most is matching gradients. It needs no backward
pass: log p(next token) of the network moved along the update, less that before, says how much each
token belongs to the text. A beam search writes the text from left to right. Two things keep it to
readable text: the network's own log p as a prior, and that a next token must be plausible to the
moved network; that no pair of tokens comes twice keeps it from going round in circles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedpeat.adapter.lora import State
from fedpeat.adapter.tunable import Tunable
from fedpeat.model.modes import evaluating
from fedpeat.tuning.loss import autocast

__all__ = ["Inversion", "invert"]

_FIRST_TOKENS = 256  # scored at once


@dataclass(frozen=True)
class Inversion:
    """How texts are read back.

    Attributes:
        num_tokens: Tokens of a text.
        width: Beams of a text.
        amplification: What the update is multiplied by; more than 1 where few steps made it.
        prior_weight: What the network's own log p counts beside the gain.
        plausible_ratio: Least probability of a next token, beside that of the likeliest one.

    Source:
        Zhu et al. (2019), Deep leakage from gradients, for matching gradients; Balunovic et al.
        (2022), LAMP, for the language model as a prior; Li et al. (2023), Contrastive decoding, for
        gains among plausible tokens. The search without a backward pass is ours.
    """

    num_tokens: int
    width: int = 32
    amplification: float = 1.0
    prior_weight: float = 0.6
    plausible_ratio: float = 0.1


class _Mover:
    """A network moved along an update, which says what a next token gains."""

    def __init__(self, tunable: Tunable, start: State, update: State, settings: Inversion) -> None:
        moved = {n: start[n] + settings.amplification * update[n] for n in start}
        self._tunable = tunable
        self._start = start
        self._moved = {name: array.astype(np.float32) for name, array in moved.items()}
        self._settings = settings
        self._banned: dict[int, list[int]] = {}

    def gains(self, tokens: Int[Tensor, "texts length"]) -> Float[Tensor, "texts vocab"]:
        """Return what each next token of each text adds to its score."""
        after, before = self._log_p(self._moved, tokens), self._log_p(self._start, tokens)
        total = after - (1 - self._settings.prior_weight) * before
        least = after.amax(-1, keepdim=True) + math.log(self._settings.plausible_ratio)
        total[after < least] = -torch.inf
        for row, text in enumerate(tokens.tolist()):
            seen = [b for a, b in itertools.pairwise(text) if a == text[-1]]
            total[row, self._banned.get(text[-1], []) + seen] = -torch.inf
        return total

    def _log_p(
        self, state: State, tokens: Int[Tensor, "texts length"]
    ) -> Float[Tensor, "texts vocab"]:
        self._tunable.load(state)
        model, device = self._tunable.model, self._tunable.device
        with autocast(model, device):
            logits = model(input_ids=tokens.to(device), use_cache=False).logits[:, -1]
        return torch.log_softmax(logits.float(), dim=-1).cpu()

    def ban(self, text: Sequence[int]) -> None:
        """Leave out the pairs of tokens of a text that was found, so that another one is."""
        for one, other in itertools.pairwise(text):
            self._banned.setdefault(one, []).append(other)


def invert(
    tunable: Tunable, start: State, update: State, num_texts: int, settings: Inversion
) -> list[list[int]]:
    """Return texts that an update was made of, as an attacker reads them from it, the best first.

    Args:
        tunable: The network that was tuned; its adapter is left at ``start``.
        start: The adapter before.
        update: What was added to it.
        num_texts: Texts to look for.
        settings: How.
    """
    mover = _Mover(tunable, start, update, settings)
    found: list[list[int]] = []
    with evaluating(tunable.model), torch.inference_mode():
        for _ in range(num_texts):
            found.append(_best_text(mover, tunable, settings))
            mover.ban(found[-1])
    tunable.load(start)
    return found


def _best_text(mover: _Mover, tunable: Tunable, settings: Inversion) -> list[int]:
    beams, scores = _first_pairs(mover, tunable, settings.width)
    while beams.shape[1] < settings.num_tokens:
        rows, tokens, scores = _best(scores[:, None] + mover.gains(beams), settings.width)
        beams = torch.cat([beams[rows], tokens[:, None]], dim=1)
    best: list[int] = beams[0].tolist()
    return best


def _first_pairs(
    mover: _Mover, tunable: Tunable, width: int
) -> tuple[Int[Tensor, "beams two"], Float[Tensor, " beams"]]:
    """Return the best pairs of first tokens; of the first alone an update says nothing."""
    num_tokens = int(tunable.network.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    pairs, scores = torch.empty((0, 2), dtype=torch.long), torch.empty(0)
    for first in torch.arange(num_tokens).split(_FIRST_TOKENS):
        rows, seconds, best = _best(mover.gains(first[:, None]), width)
        pairs = torch.cat([pairs, torch.stack([first[rows], seconds], dim=1)])
        scores = torch.cat([scores, best])
    scores, order = scores.topk(min(width, len(scores)))
    return pairs[order], scores


def _best(
    totals: Float[Tensor, "texts vocab"], width: int
) -> tuple[Int[Tensor, " best"], Int[Tensor, " best"], Float[Tensor, " best"]]:
    """Return the rows, the tokens and the scores of the best next tokens of all texts."""
    scores, places = totals.flatten().topk(min(width, totals.numel()))
    return places // totals.shape[1], places % totals.shape[1], scores
