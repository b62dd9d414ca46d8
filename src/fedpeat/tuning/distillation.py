"""Distil an emulator: teach its kept blocks to stand in for those that were dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div

from fedpeat.core.errors import EmulatorError
from fedpeat.data.examples import Examples
from fedpeat.tuning.evaluation import evaluate, evaluating
from fedpeat.tuning.local import batch_rows
from fedpeat.tuning.loss import Batch, autocast, batch_of, mean_loss_of_logits
from fedpeat.tuning.schedule import warmup_cosine

__all__ = [
    "DistillSettings",
    "Pair",
    "Terms",
    "distill",
    "distillation_loss",
    "hidden_error",
    "logit_divergence",
    "measure_fidelity",
]

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of a distillation's loss; one of 0 switches off that term alone.

    Attributes:
        lm: Loss of the emulator at its task, as a language model or a classifier.
        hidden: Normalised error of the hidden states at the end of the middle.
        logit: Divergence of the distributions of tokens, or classes.
        block: Mean of the hidden states' errors after each kept block of the middle.
    """

    lm: float = 0.0
    hidden: float = 0.0
    logit: float = 0.0
    block: float = 0.0


@dataclass(frozen=True)
class DistillSettings:
    """How an emulator is distilled."""

    num_tokens: int
    terms: Terms
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Pair:
    """A full model, its emulator, and the blocks of each after which hidden states should agree.

    Attributes:
        teacher: The full model.
        student: The emulator.
        meetings: Pairs of a block of the full model and one of the emulator, in order; after the
            last of them the two have the same blocks.
    """

    teacher: nn.Module
    student: nn.Module
    meetings: Sequence[tuple[nn.Module, nn.Module]]


def hidden_error(
    teacher: Float[Tensor, "*hidden"], student: Float[Tensor, "*hidden"]
) -> Float[Tensor, ""]:
    """Return the mean squared error in units of the teacher's root mean square.

    Source:
        Offsite-Tuning (arXiv:2302.04870), its public training code: mean(((T - S) / RMS(T))^2).
    """
    rms = teacher.float().pow(2).mean().sqrt().clamp(min=1e-12)
    return ((teacher.float() - student.float()) / rms).pow(2).mean()


def logit_divergence(
    teacher: Float[Tensor, "*positions classes"], student: Float[Tensor, "*positions classes"]
) -> Float[Tensor, ""]:
    """Return the mean over positions of KL(teacher || student) [nat].

    Source:
        Hinton, Vinyals, Dean (2015), Distilling the knowledge in a neural network, at temperature
        1.
    """
    wanted, got = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return kl_div(got, wanted, reduction="none", log_target=True).sum(-1).mean()


def distillation_loss(pair: Pair, batch: Batch, terms: Terms) -> Float[Tensor, ""]:
    """Return the weighted sum of the terms that are switched on, for one batch."""
    loss = torch.zeros((), device=batch.labels.device)
    meetings = pair.meetings if terms.block else pair.meetings[-1:]
    teacher_blocks, student_blocks = zip(*meetings, strict=True)
    with _captured(student_blocks) as student_states:
        student_logits = batch.call(pair.student)
    if terms.lm:
        loss = loss + terms.lm * mean_loss_of_logits(student_logits, batch)
    if not (terms.hidden or terms.logit or terms.block):
        return loss
    with torch.no_grad(), _captured(teacher_blocks) as teacher_states:
        teacher_logits = batch.call(pair.teacher)
    errors = [hidden_error(t, s) for t, s in zip(teacher_states, student_states, strict=True)]
    if terms.hidden:
        loss = loss + terms.hidden * errors[-1]
    if terms.block:
        loss = loss + terms.block * torch.stack(errors).mean()
    if terms.logit:
        loss = loss + terms.logit * logit_divergence(teacher_logits, student_logits)
    return loss


def distill(
    pair: Pair,
    trainable: Sequence[nn.Parameter],
    data: Examples,
    settings: DistillSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> int:
    """Train an emulator's middle blocks in place, within a budget of tokens.

    Args:
        pair: Full model and emulator, both frozen.
        trainable: Parameters of the emulator to train; frozen again afterwards.
        data: The server's own examples.
        settings: Budget, weights and learning rate (warm-up over 5 % of the steps, then cosine to
            0).
        seed: Seed of the batches.
        progress: Called with tokens done, tokens in all and the loss.

    Returns:
        Tokens used: the largest number of whole batches in the budget.

    Raises:
        EmulatorError: If there is nothing to train, or the budget is below one batch.
    """
    tokens_per_step = settings.batch_size * data.tokens_per_example
    num_steps = settings.num_tokens // tokens_per_step
    if num_steps == 0 or not trainable:
        raise EmulatorError(
            f"distill must allow at least one batch of {tokens_per_step} tokens "
            f"and one block to train, got {settings.num_tokens} tokens and {len(trainable)} tensors"
        )
    device = trainable[0].device
    for parameter in trainable:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=0.1, foreach=True
    )
    with evaluating(pair.teacher), evaluating(pair.student):
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(step, num_steps)
            batch = batch_of(
                data, batch_rows(data.num_examples, settings.batch_size, step, seed), device
            )
            with autocast(pair.student, device):
                loss = distillation_loss(pair, batch, settings.terms)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                progress((step + 1) * tokens_per_step, num_steps * tokens_per_step, loss.item())
    for parameter in trainable:
        parameter.requires_grad_(False)
    return num_steps * tokens_per_step


def measure_fidelity(
    pair: Pair, data: Examples, batch_size: int, metric: str = "perplexity"
) -> dict[str, float]:
    """Return how closely an emulator follows its model on held-out examples.

    Returns:
        What the metric says of the emulator, by its name, and ``hidden_error`` at the boundary, 0
        for a perfect stand-in.
    """
    device = next(pair.student.parameters()).device
    errors = []
    teacher_block, student_block = pair.meetings[-1]
    with (
        evaluating(pair.teacher),
        evaluating(pair.student),
        torch.inference_mode(),
        autocast(pair.student, device),
    ):
        for start in range(0, data.num_examples, batch_size):
            rows = np.arange(start, min(start + batch_size, data.num_examples))
            batch = batch_of(data, rows, device)
            with _captured([teacher_block]) as teacher, _captured([student_block]) as student:
                batch.call(pair.teacher)
                batch.call(pair.student)
            errors.append(float(hidden_error(teacher[0], student[0])) * len(rows))
    quality = evaluate(pair.student, data, batch_size).value(metric)
    return {metric: quality, "hidden_error": sum(errors) / data.num_examples}


@contextmanager
def _captured(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the hidden states that some blocks put out, in the order of the call."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
