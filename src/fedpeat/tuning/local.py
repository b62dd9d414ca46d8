"""A participant's local steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from fedpeat.adapter.tunable import Tunable
from fedpeat.core.errors import AdapterError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.seeds import derive_seed, generator
from fedpeat.data.examples import Examples
from fedpeat.tuning.evaluation import evaluating
from fedpeat.tuning.loss import autocast, batch_of, mean_loss
from fedpeat.tuning.private import ExamplePrivacy, refuse_mixing

__all__ = ["LocalSettings", "LocalStats", "batch_rows", "train"]


@dataclass(frozen=True)
class LocalSettings:
    """How a participant trains.

    Attributes:
        batch_size: Examples in a batch.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Steps of linear warm-up, counted from the participant's first step of the run.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        proximal_mu: Weight of FedProx's term; 0 for none.
        noise_multiplier: Noise on the gradients, in units of ``example_clip_norm``; 0 for none.
        example_clip_norm: Norm that the gradient of each example is clipped to where there is
            noise, in place of ``max_grad_norm``.
    """

    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    proximal_mu: float = 0.0
    noise_multiplier: float = 0.0
    example_clip_norm: float = 1.0


@dataclass(frozen=True)
class LocalStats:
    """What a participant's training did: losses [nat], tokens seen, seconds taken.

    There are no losses where examples are to be hidden, since they would tell of them.
    """

    first_loss: float | None
    last_loss: float | None
    mean_loss: float | None
    num_tokens: int
    seconds: float


def batch_rows(num_examples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return the rows of one batch of an endless run of shuffled epochs.

    Any step can be asked for by itself, so that a resumed run goes on with the batches it would
    have had.
    """
    first = step * batch_size
    places = [divmod(first + i, num_examples) for i in range(batch_size)]
    orders = {
        epoch: generator(seed, "epoch", epoch).permutation(num_examples) for epoch, _ in places
    }
    return np.array([orders[epoch][place] for epoch, place in places])


def train(
    tunable: Tunable,
    data: Examples,
    settings: LocalSettings,
    *,
    num_steps: int,
    first_step: int,
    seed: int,
    noise: NoiseSource | None = None,
) -> LocalStats:
    """Make exactly ``num_steps`` optimiser steps on the adapter, in place.

    Args:
        tunable: Network whose adapter holds the round's values.
        data: The participant's own examples.
        settings: How to train.
        num_steps: Steps to make.
        first_step: Steps that the participant made in earlier rounds.
        seed: Seed of batches and dropout; PyTorch's own random state is left as it was.
        noise: What examples are hidden with, and drawn by, if the settings say so.

    Raises:
        AdapterError: If no gradient reaches the adapter, or examples cannot be hidden.

    Source:
        Loshchilov, Hutter (2019), AdamW; Li et al. (2020), FedProx: + mu/2 ||w - w_round||^2.
    """
    start = time.perf_counter()
    device = tunable.device
    parameters = list(tunable.parameters.values())
    anchors = [p.detach().clone() for p in parameters] if settings.proximal_mu else []
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    privacy = _privacy(tunable, settings, noise)
    losses = []
    with (
        evaluating(tunable.model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(derive_seed(seed, "dropout", first_step))
        tunable.model.train()
        for step in range(first_step, first_step + num_steps):
            _set_learning_rate(optimizer, settings, step)
            proximal = _proximal_term(parameters, anchors, settings.proximal_mu)
            if privacy is None:
                rows = batch_rows(data.num_examples, settings.batch_size, step, seed)
                loss = _loss(tunable, data, rows)
                losses.append(loss.detach())
                (loss + proximal).backward()
                if settings.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            else:
                rows = privacy.rows(data.num_examples, settings.batch_size, step)
                privacy.put_gradients(tunable, data, rows, settings.batch_size, step)
                if isinstance(proximal, torch.Tensor):
                    proximal.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    history = torch.stack(losses).tolist() if losses else []
    return LocalStats(
        first_loss=history[0] if history else None,
        last_loss=history[-1] if history else None,
        mean_loss=float(np.mean(history)) if history else None,
        num_tokens=num_steps * settings.batch_size * data.tokens_per_example,
        seconds=time.perf_counter() - start,
    )


def _privacy(
    tunable: Tunable, settings: LocalSettings, noise: NoiseSource | None
) -> ExamplePrivacy | None:
    if settings.noise_multiplier == 0:
        return None
    assert noise is not None, "whoever trains with noise has a source of it"
    refuse_mixing(tunable.model)
    return ExamplePrivacy(settings.example_clip_norm, settings.noise_multiplier, noise)


def _loss(tunable: Tunable, data: Examples, rows: np.ndarray) -> torch.Tensor:
    batch = batch_of(data, rows, tunable.device)
    with autocast(tunable.model, tunable.device):
        loss = mean_loss(tunable.model, batch)
    if not loss.requires_grad:
        raise AdapterError(
            "no gradient reaches the adapter: the tuned blocks take no part in what the "
            "network makes of this data; tune others"
        )
    return loss


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, settings: LocalSettings, step: int
) -> None:
    scale = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * scale


def _proximal_term(
    parameters: list[torch.nn.Parameter], anchors: list[torch.Tensor], mu: float
) -> torch.Tensor | float:
    if not anchors:
        return 0.0
    return mu / 2 * sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True))
