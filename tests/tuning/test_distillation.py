"""Distilling an emulator: each term of the loss does what it says (invariant 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks, only_blocks
from fedpeat.tuning.distillation import (
    DistillSettings,
    Pair,
    Terms,
    distill,
    distillation_loss,
    hidden_error,
    logit_divergence,
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
    meetings = [(blocks.output(teacher, 4), own.output(student, last))]
    return Pair(teacher, student, meetings)


def middle(of: Pair) -> list[nn.Parameter]:
    return list(of.meetings[-1][1].parameters())


def batch() -> Batch:
    data = random_text()
    return batch_of(data, torch.arange(4).numpy(), CPU)


def gradient(of: Pair, terms: Terms) -> Tensor:
    for parameter in middle(of):
        parameter.requires_grad_(True)
        parameter.grad = None
    distillation_loss(of, batch(), terms).backward()
    return torch.cat([p.grad.flatten() for p in middle(of) if p.grad is not None])


def test_hidden_error_worked_by_hand() -> None:
    teacher, student = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    # mean of squares of the teacher 12.5, of the difference 8
    assert float(hidden_error(teacher, student)) == pytest.approx(8 / 12.5)


def test_logit_divergence_worked_by_hand() -> None:
    teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3.0), 0.0]]])
    # one half each, against three quarters and one
    want = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(logit_divergence(teacher, student)) == pytest.approx(want)


@pytest.mark.parametrize("term", ["lm", "hidden", "logit", "block"])
def test_each_term_that_is_on_has_a_gradient(term: str) -> None:
    assert gradient(pair(), Terms(**{term: 1.0})).abs().max() > 0


@pytest.mark.parametrize("term", ["lm", "hidden", "logit", "block"])
def test_a_weight_of_zero_switches_off_that_term_alone(term: str) -> None:
    of, weights = pair(), {"lm": 1.0, "hidden": 2.0, "logit": 3.0, "block": 4.0}
    without = gradient(of, Terms(**{**weights, term: 0.0}))
    alone = gradient(of, Terms(**{term: weights[term]}))
    torch.testing.assert_close(
        gradient(of, Terms(**weights)), without + alone, rtol=1e-4, atol=1e-5
    )


def test_the_language_models_loss_alone_is_the_emulators_own() -> None:
    of = pair()
    alone = distillation_loss(of, batch(), Terms(lm=1.0))
    assert alone.item() == mean_loss(of.student, batch()).item()


def test_the_term_of_blocks_is_the_mean_over_all_meetings() -> None:
    of = pair((0, 2, 4, 5))
    model, student = of.teacher, of.student
    meetings = [
        (model.get_submodule("model.layers.3"), student.get_submodule("model.layers.1")),
        (model.get_submodule("model.layers.4"), student.get_submodule("model.layers.2")),
    ]
    each = [
        float(distillation_loss(Pair(model, student, [m]), batch(), Terms(hidden=1.0)))
        for m in meetings
    ]
    both = Pair(model, student, meetings)
    assert float(distillation_loss(both, batch(), Terms(block=1.0))) == pytest.approx(np.mean(each))
    assert float(distillation_loss(both, batch(), Terms(hidden=1.0))) == pytest.approx(each[1])


def test_an_emulator_of_every_block_has_no_hidden_error() -> None:
    assert measure_fidelity(pair(tuple(range(6))), random_text(), 4)["hidden_error"] == 0


def test_distillation_brings_the_emulator_closer_within_its_budget() -> None:
    of, data = pair(), random_text()
    before = measure_fidelity(of, data, 4)["hidden_error"]
    settings = DistillSettings(
        num_tokens=4_000, terms=Terms(hidden=1.0), learning_rate=3e-3, batch_size=4
    )
    calls: list[tuple[int, int]] = []
    used = distill(
        [lambda: nullcontext(of)],
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


def rungs() -> tuple[Pair, list[Callable[[], AbstractContextManager[Pair]]]]:
    """Return an emulator of five blocks, and what makes it itself and one of four."""
    whole = pair((0, 2, 4, 5))
    own = find_blocks(whole.teacher).select((0, 2, 4, 5))

    @contextmanager
    def smaller() -> Iterator[Pair]:
        with only_blocks(whole.student, own, [0, 1, 3]):
            yield Pair(
                whole.teacher, whole.student, [(whole.meetings[0][0], own.output(whole.student, 1))]
            )

    return whole, [lambda: nullcontext(whole), smaller]


def parameters_of(of: Pair) -> list[nn.Parameter]:
    layers = [of.student.get_submodule(f"model.layers.{i}") for i in (1, 2)]
    return [p for layer in layers for p in layer.parameters()]


def test_a_step_adds_up_the_gradients_of_all_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        groups = optimizer.param_groups
        taken.append(
            torch.cat([p.grad.flatten() for g in groups for p in g["params"] if p.grad is not None])
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    settings = DistillSettings(64, Terms(hidden=1.0, logit=1.0), learning_rate=1e-3, batch_size=4)
    for which in ([0], [1], [0, 1]):
        whole, both = rungs()
        distill([both[i] for i in which], parameters_of(whole), random_text(), settings, seed=0)
        if which == [1]:  # the block that the smaller rung lacks has no gradient
            taken[-1] = torch.cat([taken[-1], torch.zeros(len(taken[0]) - len(taken[-1]))])
    torch.testing.assert_close(taken[2], taken[0] + taken[1])


def test_the_full_model_is_called_once_for_all_rungs() -> None:
    whole, both = rungs()
    calls: list[int] = []
    whole.teacher.register_forward_hook(lambda *_: calls.append(1))
    settings = DistillSettings(192, Terms(hidden=1.0), learning_rate=1e-3, batch_size=4)
    distill(both, parameters_of(whole), random_text(), settings, seed=0)
    assert len(calls) == 3


def test_only_the_middle_is_trained() -> None:
    of = pair()
    fixed = {
        n: p.detach().clone()
        for n, p in of.student.named_parameters()
        if not n.startswith("model.layers.1.")
    }
    teacher = {n: p.detach().clone() for n, p in of.teacher.named_parameters()}
    settings = DistillSettings(
        num_tokens=640, terms=Terms(lm=1.0, hidden=30.0), learning_rate=1e-2, batch_size=4
    )
    distill([lambda: nullcontext(of)], middle(of), random_text(), settings, seed=0)
    for name, parameter in of.student.named_parameters():
        assert name not in fixed or torch.equal(parameter, fixed[name]), name
    assert all(torch.equal(p, teacher[n]) for n, p in of.teacher.named_parameters())
    assert not any(p.requires_grad for p in of.student.parameters())


def test_a_budget_below_one_batch_is_refused() -> None:
    of = pair()
    settings = DistillSettings(
        num_tokens=63, terms=Terms(lm=1.0, hidden=1.0), learning_rate=1e-3, batch_size=4
    )
    with pytest.raises(EmulatorError, match="at least one batch of 64 tokens"):
        distill([lambda: nullcontext(of)], middle(of), random_text(), settings, seed=0)
