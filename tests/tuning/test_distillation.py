"""Distilling an emulator: each term of the loss does what it says (invariant 6)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.tuning.distillation import (
    DistillSettings,
    Pair,
    distill,
    distillation_loss,
    hidden_error,
    measure_fidelity,
)
from fedpeat.tuning.loss import Batch, batch_of, mean_loss
from tiny import random_text, tiny_model

CPU = torch.device("cpu")


def pair(kept: tuple[int, ...] = (0, 2, 5)) -> Pair:
    """Return a model and an emulator; blocks 0 and 5 are tuned, so they meet after block 4."""
    teacher = tiny_model("llama")
    blocks = find_blocks(teacher)
    student = build_from_blocks(teacher, blocks, kept)
    last = max(j for j, i in enumerate(kept) if i <= 4)
    own = blocks.select(kept)
    return Pair(teacher, student, blocks.output(teacher, 4), own.output(student, last))


def middle(of: Pair) -> list[nn.Parameter]:
    return list(of.student_block.parameters())


def batch() -> Batch:
    data = random_text()
    return batch_of(data, torch.arange(4).numpy(), CPU)


def gradient(of: Pair, lm_weight: float, hidden_weight: float) -> Tensor:
    for parameter in middle(of):
        parameter.requires_grad_(True)
        parameter.grad = None
    distillation_loss(of, batch(), lm_weight=lm_weight, hidden_weight=hidden_weight).backward()
    return torch.cat([p.grad.flatten() for p in middle(of) if p.grad is not None])


def test_hidden_error_worked_by_hand() -> None:
    teacher, student = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    # mean of squares of the teacher 12.5, of the difference 8
    assert float(hidden_error(teacher, student)) == pytest.approx(8 / 12.5)


def test_each_term_that_is_on_has_a_gradient() -> None:
    of = pair()
    assert gradient(of, 1.0, 0.0).abs().max() > 0
    assert gradient(of, 0.0, 1.0).abs().max() > 0


def test_a_weight_of_zero_switches_off_that_term_alone() -> None:
    of = pair()
    both, lm, hidden = gradient(of, 1.0, 2.0), gradient(of, 1.0, 0.0), gradient(of, 0.0, 2.0)
    torch.testing.assert_close(both, lm + hidden, rtol=1e-4, atol=1e-6)
    lm_alone = distillation_loss(of, batch(), lm_weight=1.0, hidden_weight=0.0)
    assert lm_alone.item() == mean_loss(of.student, batch()).item()


def test_an_emulator_of_every_block_has_no_hidden_error() -> None:
    assert measure_fidelity(pair(tuple(range(6))), random_text(), 4)["hidden_error"] == 0


def test_distillation_brings_the_emulator_closer_within_its_budget() -> None:
    of, data = pair(), random_text()
    before = measure_fidelity(of, data, 4)["hidden_error"]
    settings = DistillSettings(
        num_tokens=4_000, lm_weight=0.0, hidden_weight=1.0, learning_rate=3e-3, batch_size=4
    )
    calls: list[tuple[int, int]] = []
    used = distill(
        of,
        middle(of),
        data,
        settings,
        seed=0,
        progress=lambda done, total, _: calls.append((done, total)),
    )
    assert used == 3_968  # 62 whole batches of 64 tokens
    assert calls[-1] == (3_968, 3_968)
    assert len(calls) == 62
    assert measure_fidelity(of, data, 4)["hidden_error"] < 0.7 * before


def test_only_the_middle_is_trained() -> None:
    of = pair()
    fixed = {
        n: p.detach().clone()
        for n, p in of.student.named_parameters()
        if not n.startswith("model.layers.1.")
    }
    teacher = {n: p.detach().clone() for n, p in of.teacher.named_parameters()}
    settings = DistillSettings(
        num_tokens=640, lm_weight=1.0, hidden_weight=30.0, learning_rate=1e-2, batch_size=4
    )
    distill(of, middle(of), random_text(), settings, seed=0)
    for name, parameter in of.student.named_parameters():
        assert name not in fixed or torch.equal(parameter, fixed[name]), name
    assert all(torch.equal(p, teacher[n]) for n, p in of.teacher.named_parameters())
    assert not any(p.requires_grad for p in of.student.parameters())


def test_a_budget_below_one_batch_is_refused() -> None:
    of = pair()
    settings = DistillSettings(
        num_tokens=63, lm_weight=1.0, hidden_weight=1.0, learning_rate=1e-3, batch_size=4
    )
    with pytest.raises(EmulatorError, match="at least one batch of 64 tokens"):
        distill(of, middle(of), random_text(), settings, seed=0)
