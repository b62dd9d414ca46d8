"""Distil an emulator: teach its kept blocks to stand in for those that were dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div

from fedpeat.core.errors import EmulatorError
from fedpeat.data.examples import Examples
from fedpeat.model.tracing import states_after
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
States = Mapping[nn.Module, Tensor]


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

    @property
    def compare(self) -> bool:
        """Whether any of them looks at the full model."""
        return bool(self.hidden or self.logit or self.block)


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


@dataclass(frozen=True)
class Lesson:
    """What the full model makes of a batch.

    Attributes:
        logits: Its scores.
        states: Hidden states that leave the blocks asked for.
    """

    logits: Tensor
    states: States


def lesson_of(teacher: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> Lesson:
    """Call the full model once, for all the emulators that learn from a batch."""
    with torch.no_grad(), states_after(blocks) as states:
        logits = batch.call(teacher)
    return Lesson(logits, states)


def distillation_loss(
    pair: Pair, batch: Batch, terms: Terms, lesson: Lesson | None = None
) -> Float[Tensor, ""]:
    """Return the weighted sum of the terms that are switched on, for one batch.

    Args:
        pair: Full model and emulator.
        batch: The batch.
        terms: Weights of the terms.
        lesson: What the full model makes of the batch; None calls it.
    """
    meetings = pair.meetings if terms.block else pair.meetings[-1:]
    loss = torch.zeros((), device=batch.labels.device)
    with states_after([block for _, block in meetings]) as states:
        logits = batch.call(pair.student)
    if terms.lm:
        loss = loss + terms.lm * mean_loss_of_logits(logits, batch)
    if not terms.compare:
        return loss
    lesson = lesson or lesson_of(pair.teacher, [block for block, _ in meetings], batch)
    errors = [hidden_error(lesson.states[t], states[s]) for t, s in meetings]
    if terms.hidden:
        loss = loss + terms.hidden * errors[-1]
    if terms.block:
        loss = loss + terms.block * torch.stack(errors).mean()
    if terms.logit:
        loss = loss + terms.logit * logit_divergence(lesson.logits, logits)
    return loss


def distill(
    rungs: Sequence[Callable[[], AbstractContextManager[Pair]]],
    trainable: Sequence[nn.Parameter],
    data: Examples,
    settings: DistillSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> int:
    """Train the middle blocks of emulators in place, within a budget of tokens.

    Emulators that are parts of one network are trained together: each step adds up the gradients of
    all of them on the same batch, so that a block fits every emulator that has it.

    Args:
        rungs: Each makes a network an emulator for a while, paired with the full model, all frozen;
            the first has all blocks of the others.
        trainable: Parameters of the first emulator to train; frozen again afterwards.
        data: The server's own examples.
        settings: Budget, weights and learning rate (warm-up over 5 % of the steps, then cosine to
            0).
        seed: Seed of the batches.
        progress: Called with tokens done, tokens in all and the mean loss.

    Returns:
        Tokens used: the largest number of whole batches in the budget.

    Raises:
        EmulatorError: If there is nothing to train, or the budget is below one batch.

    Source:
        Yu and Huang (2019), Universally slimmable networks (arXiv:1903.05134), for gradients of the
        largest, the smallest and other widths added up in each step; here of depths, and all.
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
        trainable, lr=settings.learning_rate, weight_decay=0.1, fused=True
    )
    with ExitStack() as stack:
        blocks: list[nn.Module] = []
        for rung in rungs:
            with rung() as pair:
                teacher = pair.teacher
                blocks += [block for block, _ in pair.meetings]
                stack.enter_context(evaluating(pair.student))
        stack.enter_context(evaluating(teacher))
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(step, num_steps)
            batch = batch_of(
                data, batch_rows(data.num_examples, settings.batch_size, step, seed), device
            )
            with autocast(teacher, device):
                lesson = lesson_of(teacher, blocks, batch) if settings.terms.compare else None
            losses = []
            for rung in rungs:
                with rung() as pair, autocast(pair.student, device):
                    loss = distillation_loss(pair, batch, settings.terms, lesson)
                loss.backward()
                losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                mean = sum(losses) / len(losses)
                progress((step + 1) * tokens_per_step, num_steps * tokens_per_step, mean)
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
            with states_after([teacher_block]) as teacher, states_after([student_block]) as student:
                batch.call(pair.teacher)
                batch.call(pair.student)
            error = hidden_error(teacher[teacher_block], student[student_block])
            errors.append(float(error) * len(rows))
    quality = evaluate(pair.student, data, batch_size).value(metric)
    return {metric: quality, "hidden_error": sum(errors) / data.num_examples}
