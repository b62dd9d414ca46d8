"""Distil an emulator: teach its kept blocks to stand in for those that were dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.data.packing import PackedText
from fedpeat.tuning.evaluation import evaluate, evaluating
from fedpeat.tuning.local import batch_rows
from fedpeat.tuning.loss import autocast, batch_of, mean_loss
from fedpeat.tuning.schedule import warmup_cosine

__all__ = [
    "DistillSettings",
    "Pair",
    "distill",
    "distillation_loss",
    "hidden_error",
    "measure_fidelity",
]

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class DistillSettings:
    """How an emulator is distilled; a weight of 0 switches off that term alone."""

    num_tokens: int
    lm_weight: float
    hidden_weight: float
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Pair:
    """A full model, its emulator, and the block in each after which hidden states should agree."""

    teacher: nn.Module
    student: nn.Module
    teacher_block: nn.Module
    student_block: nn.Module


def hidden_error(
    teacher: Float[Tensor, "batch seq hidden"], student: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, ""]:
    """Return the mean squared error in units of the teacher's root mean square.

    Source:
        Offsite-Tuning (arXiv:2302.04870), its public training code: mean(((T - S) / RMS(T))^2).
    """
    rms = teacher.float().pow(2).mean().sqrt().clamp(min=1e-12)
    return ((teacher.float() - student.float()) / rms).pow(2).mean()


def distillation_loss(
    pair: Pair, ids: Tensor, mask: Tensor, *, lm_weight: float, hidden_weight: float
) -> Float[Tensor, ""]:
    """Return lm_weight * LM + hidden_weight * hidden error of one batch."""
    loss = torch.zeros((), device=ids.device)
    with _captured(pair.student_block) as student_hidden:
        lm_loss = mean_loss(pair.student, ids, mask)
    if lm_weight:
        loss = loss + lm_weight * lm_loss
    if hidden_weight:
        with torch.no_grad(), _captured(pair.teacher_block) as teacher_hidden:
            pair.teacher(input_ids=ids, use_cache=False)
        loss = loss + hidden_weight * hidden_error(teacher_hidden[0], student_hidden[0])
    return loss


def distill(
    pair: Pair,
    trainable: Sequence[nn.Parameter],
    data: PackedText,
    settings: DistillSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> int:
    """Train an emulator's middle blocks in place, within a budget of tokens.

    Args:
        pair: Full model and emulator, both frozen.
        trainable: Parameters of the emulator to train; frozen again afterwards.
        data: The server's own text.
        settings: Budget, weights and learning rate (warm-up over 5 % of the steps, then cosine to
            0).
        seed: Seed of the batches.
        progress: Called with tokens done, tokens in all and the loss.

    Returns:
        Tokens used: the largest number of whole batches in the budget.

    Raises:
        EmulatorError: If there is nothing to train, or the budget is below one batch.
    """
    tokens_per_step = settings.batch_size * int(data.input_ids.shape[1])
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
            ids, mask = batch_of(
                data, batch_rows(data.num_examples, settings.batch_size, step, seed), device
            )
            with autocast(pair.student, device):
                loss = distillation_loss(
                    pair,
                    ids,
                    mask,
                    lm_weight=settings.lm_weight,
                    hidden_weight=settings.hidden_weight,
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                progress((step + 1) * tokens_per_step, num_steps * tokens_per_step, loss.item())
    for parameter in trainable:
        parameter.requires_grad_(False)
    return num_steps * tokens_per_step


def measure_fidelity(pair: Pair, data: PackedText, batch_size: int) -> dict[str, float]:
    """Return how closely an emulator follows its model on held-out text.

    Returns:
        ``perplexity`` of the emulator, and ``hidden_error`` at the boundary, 0 for a perfect
        stand-in.
    """
    device = next(pair.student.parameters()).device
    errors = []
    with (
        evaluating(pair.teacher),
        evaluating(pair.student),
        torch.inference_mode(),
        autocast(pair.student, device),
    ):
        for start in range(0, data.num_examples, batch_size):
            rows = np.arange(start, min(start + batch_size, data.num_examples))
            ids, _ = batch_of(data, rows, device)
            with _captured(pair.teacher_block) as teacher, _captured(pair.student_block) as student:
                pair.teacher(input_ids=ids, use_cache=False)
                pair.student(input_ids=ids, use_cache=False)
            errors.append(float(hidden_error(teacher[0], student[0])) * len(rows))
    perplexity = evaluate(pair.student, data, batch_size).perplexity
    return {"perplexity": perplexity, "hidden_error": sum(errors) / data.num_examples}


@contextmanager
def _captured(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that a block puts out."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
