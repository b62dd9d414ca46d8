"""How faithful an emulator is: numbers worked by hand, and nothing changed by measuring."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeat.adapter.tunable import Tunable, attach, attached
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.tuning.distillation import Pair
from fedpeat.tuning.fidelity import adapter_gradient, agreement, gradient_cosines
from fedpeat.tuning.loss import batch_of, mean_loss
from tiny import CLASSES, random_images, random_text, tiny_model, tiny_vit

CPU = torch.device("cpu")
LORA = AdapterConfig(r=2)


def pair(kept: tuple[int, ...] = (0, 2, 5), kind: str = "llama") -> Pair:
    """Return a model and an emulator; blocks 0 and 5 are tuned, so they meet after block 4."""
    teacher = tiny_model(kind)
    blocks = find_blocks(teacher)
    student = build_from_blocks(teacher, blocks, kept)
    last = max(j for j, i in enumerate(kept) if i <= 4)
    own = blocks.select(kept)
    return Pair(teacher, student, [(blocks.output(teacher, 4), own.output(student, last))])


def tunable(kept: tuple[int, ...] | None, kind: str = "llama") -> tuple[Tunable, Blocks]:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    here = model if kept is None else build_from_blocks(model, blocks, kept)
    return attach(here, blocks, [0, 5], LORA, kept=kept, seed=1), blocks


class Fixed(nn.Module):
    """A network whose block and logits are what it was made with."""

    def __init__(self, states: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.block = nn.Identity()
        self.states, self.logits = states, logits

    def forward(self, **_: object) -> Any:
        self.block(self.states)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.logits)


def test_agreement_worked_by_hand() -> None:
    data = random_text(1)
    length = data.input_ids.shape[1]
    # half of the positions: (3, 4) against (3, 0); the others equal
    teacher = torch.tensor([3.0, 4.0]).expand(1, length, 2)
    student = teacher.clone()
    student[:, ::2, 1] = 0.0
    ours, theirs = torch.zeros(1, length, 2), torch.zeros(1, length, 2)
    ours[..., 0] = math.log(3)  # 3/4 and 1/4, against 1/2 and 1/2
    theirs[:, 1::2, 1] = 1e-3  # every second guess is the other one
    one, other = Fixed(teacher, ours), Fixed(student, torch.zeros_like(ours))
    measured = agreement(Pair(one, other, [(one.block, other.block)]), data, 4)
    assert measured["hidden_relative_error"] == pytest.approx(math.sqrt(16 / 2 / 25))
    assert measured["hidden_cosine"] == pytest.approx((1 + 3 / 5) / 2)
    assert measured["logit_kl"] == pytest.approx(
        0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5), rel=1e-5
    )
    other.logits = theirs
    same = agreement(Pair(one, other, [(one.block, other.block)]), data, 4)["top1_agreement"]
    assert same == pytest.approx(sum(i % 2 == 0 for i in range(length - 1)) / (length - 1))


@pytest.mark.parametrize("shape", [(4, 1, 2), (4, 2, 1, 1)])
def test_agreement_on_images_worked_by_hand(shape: tuple[int, ...]) -> None:
    # two of four images: (3, 4) against (3, 0), as a sequence of one state or as two channels
    teacher = torch.tensor([3.0, 4.0]).expand(4, 2).clone()
    student = teacher.clone()
    student[2:, 1] = 0.0
    ours, theirs = torch.zeros(2, 4, len(CLASSES))
    ours[:, 0], theirs[:, 0] = math.log(2), torch.tensor([1.0, 1.0, 1.0, -1.0])
    one, other = Fixed(teacher.view(shape), ours), Fixed(student.view(shape), torch.zeros(4, 3))
    measured = agreement(Pair(one, other, [(one.block, other.block)]), random_images(4), 4)
    assert measured["hidden_relative_error"] == pytest.approx(math.sqrt(16 / 2 / 25))
    assert measured["hidden_cosine"] == pytest.approx((1 + 3 / 5) / 2)
    assert measured["logit_kl"] == pytest.approx(
        0.5 * math.log(0.5 * 3) + 2 * 0.25 * math.log(0.25 * 3), rel=1e-5
    )
    other.logits = theirs
    same = agreement(Pair(one, other, [(one.block, other.block)]), random_images(4), 4)
    assert same["top1_agreement"] == 3 / 4


def test_an_emulator_of_every_block_agrees_in_all() -> None:
    measured = agreement(pair(tuple(range(6))), random_text(), 3)
    assert measured["hidden_relative_error"] == 0
    assert measured["hidden_cosine"] == pytest.approx(1)
    assert measured["logit_kl"] == pytest.approx(0, abs=1e-6)
    assert measured["top1_agreement"] == 1


def test_the_gradient_is_that_of_the_mean_loss_whatever_the_batches() -> None:
    data = random_text(5)
    full, _ = tunable(None)
    mean_loss(full.model, batch_of(data, torch.arange(5).numpy(), CPU)).backward()
    expected = {n: p.grad.clone() for n, p in full.parameters.items() if p.grad is not None}
    for batch_size in (2, 5):
        found = adapter_gradient(full, data, batch_size)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_gradient_on_images_is_that_of_the_mean_loss_too() -> None:
    data, model = random_images(5), tiny_vit()
    full = attach(model, find_blocks(model), [0, 5], LORA, seed=1)
    mean_loss(full.model, batch_of(data, torch.arange(5).numpy(), CPU)).backward()
    expected = {n: p.grad.clone() for n, p in full.parameters.items() if p.grad is not None}
    assert any(gradient.any() for gradient in expected.values())
    found = adapter_gradient(full, data, 2)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_cosines_worked_by_hand() -> None:
    blocks = tunable(None)[1]
    first, last = "model.layers.0.a", "model.layers.5.a"
    full = {first: torch.tensor([1.0, 0.0]), last: torch.tensor([2.0, 0.0]), "b": torch.ones(2)}
    other = {first: torch.tensor([1.0, 1.0]), last: torch.tensor([-1.0, 0.0]), "b": torch.ones(3)}
    cosines = gradient_cosines(full, other, blocks)
    assert cosines == pytest.approx(
        {
            "gradient_cosine": (1 - 2) / math.sqrt(5 * 3),
            "gradient_cosine_block_0": 1 / math.sqrt(2),
            "gradient_cosine_block_5": -1,
        }
    )
    assert gradient_cosines({first: torch.zeros(2)}, other, blocks) == {}


def test_gradients_agree_on_an_emulator_of_every_block_and_differ_on_a_smaller_one() -> None:
    full, blocks = tunable(None)
    gradient = adapter_gradient(full, random_text(), 4)
    whole = adapter_gradient(tunable(tuple(range(6)))[0], random_text(), 4)
    small = adapter_gradient(tunable((0, 2, 5))[0], random_text(), 4)
    assert gradient_cosines(gradient, whole, blocks)["gradient_cosine"] == pytest.approx(1)
    assert gradient_cosines(gradient, small, blocks)["gradient_cosine"] < 0.99
    # LoRA starts with B = 0, where A has no gradient
    assert all(bool(g.any()) == ("lora_B" in n) for n, g in gradient.items())


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "values": copy.deepcopy(model.state_dict()),
        "types": {n: p.dtype for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "modes": {n: (id(m), m.training) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": sum(len(vars(m)["_forward_hooks"]) for m in model.modules()),
        "random": torch.random.get_rng_state().tolist(),
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one.pop("values").items():
        assert torch.equal(value, other["values"][name]), name
    del other["values"]
    assert one == other


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_attached_for_a_while_leaves_no_trace(method: Any, dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)  # type: ignore[arg-type]
    model.transformer.h[1].train()
    next(model.parameters()).requires_grad_(True)
    before = snapshot(model)
    blocks = find_blocks(model)
    with attached(model, blocks, [0, 5], AdapterConfig(method=method, r=2)) as there:
        assert not model.transformer.h[1].training
        there.load({name: a + 1 for name, a in there.state().items()})
        adapter_gradient(there, random_text(2), 2)
    assert_equal(before, snapshot(model))


def test_an_adapter_that_cannot_be_attached_leaves_no_trace() -> None:
    model = tiny_model("gpt2")
    before = snapshot(model)
    with (
        pytest.raises(AdapterError),
        attached(model, find_blocks(model), [0], AdapterConfig(target_modules=("nothing",))),
    ):
        pass
    assert_equal(before, snapshot(model))


def test_measuring_leaves_both_networks_as_they_were() -> None:
    of = pair()
    of.student.train()
    before = snapshot(of.teacher), snapshot(of.student)
    agreement(of, random_text(), 4)
    assert_equal(before[0], snapshot(of.teacher))
    assert_equal(before[1], snapshot(of.student))
