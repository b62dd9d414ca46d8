"""Local steps: exact, repeatable, and only the adapter moves (invariants 6 and 7)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.data.packing import PackedText
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.local import LocalSettings, LocalStats, batch_rows, train
from tiny import random_text, tiny_model

SETTINGS = LocalSettings(batch_size=4, learning_rate=1e-2)


def tunable(method: str = "lora", kind: str = "llama", **settings: object) -> Tunable:
    model = tiny_model(kind)
    config = AdapterConfig(method=method, num_bottom=1, num_top=1, r=2, **settings)  # type: ignore[arg-type]
    return attach(model, find_blocks(model), [0, 5], config)


def tuned(
    num_steps: int = 3, first_step: int = 0, settings: LocalSettings = SETTINGS, **adapter: object
) -> tuple[Tunable, LocalStats]:
    result = tunable(**adapter)  # type: ignore[arg-type]
    stats = train(
        result, random_text(), settings, num_steps=num_steps, first_step=first_step, seed=5
    )
    return result, stats


def rates_of_each_step(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Watch the optimiser: return a list that gets the learning rate of every step made."""
    rates: list[float] = []
    original = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return rates


def as_bytes(state: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.items()}


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_number_of_steps_is_exact(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = rates_of_each_step(monkeypatch)
    _, stats = tuned(num_steps)
    assert (len(rates), stats.num_tokens) == (num_steps, num_steps * 4 * 16)


def test_loss_falls_and_is_that_of_the_model() -> None:
    result, stats = tuned(40)
    assert stats.first_loss is not None
    assert stats.last_loss is not None
    assert stats.last_loss < stats.first_loss
    rows = batch_rows(8, 4, 0, seed=5)
    ids = torch.from_numpy(random_text().input_ids[rows].astype(np.int64))
    fresh = tiny_model("llama")
    assert stats.first_loss == pytest.approx(float(fresh(input_ids=ids, labels=ids).loss), abs=1e-5)
    assert result.parameters


def test_only_the_adapter_moves() -> None:
    result = tunable()
    frozen = {
        n: p.detach().clone() for n, p in result.model.named_parameters() if not p.requires_grad
    }
    train(result, random_text(), SETTINGS, num_steps=3, first_step=0, seed=5)
    for name, parameter in result.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert all(p.grad is None for p in result.model.parameters())


def test_same_seed_gives_the_same_adapter_bit_for_bit() -> None:
    assert as_bytes(tuned(lora_dropout=0.2)[0].state()) == as_bytes(
        tuned(lora_dropout=0.2)[0].state()
    )


def test_training_leaves_mode_and_random_stream_alone() -> None:
    result = tunable(kind="gpt2", lora_dropout=0.2)
    result.model.eval()
    before = torch.get_rng_state()
    train(result, random_text(), SETTINGS, num_steps=2, first_step=0, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in result.model.modules())


def test_dropout_is_on_while_training() -> None:
    assert as_bytes(tuned(lora_dropout=0.5)[0].state()) != as_bytes(
        tuned(lora_dropout=0.0)[0].state()
    )


def test_tokens_outside_the_mask_do_not_count() -> None:
    data = random_text()
    mask = data.loss_mask.copy()
    mask[:, :8] = False
    ids = data.input_ids.copy()
    masked = PackedText(ids, mask, data.token_bytes)
    result = tunable()
    stats = train(result, masked, SETTINGS, num_steps=1, first_step=0, seed=5)
    rows = batch_rows(8, 4, 0, seed=5)
    batch = torch.from_numpy(ids[rows].astype(np.int64))
    labels = batch.masked_fill(~torch.from_numpy(mask[rows]), -100)
    assert stats.first_loss == pytest.approx(
        float(tiny_model("llama")(input_ids=batch, labels=labels).loss), abs=1e-5
    )


def test_a_batch_without_any_wanted_token_gives_zero_and_not_nan() -> None:
    data = random_text()
    silent = PackedText(data.input_ids, np.zeros_like(data.loss_mask), data.token_bytes)
    result = tunable()
    stats = train(result, silent, SETTINGS, num_steps=1, first_step=0, seed=5)
    assert stats.first_loss == 0
    assert all(np.isfinite(a).all() for a in result.state().values())


def test_proximal_term_pulls_towards_the_rounds_adapter() -> None:
    start = tunable().state()

    def distance(mu: float) -> float:
        end = tuned(10, settings=replace(SETTINGS, proximal_mu=mu))[0].state()
        return float(sum(((end[n] - start[n]) ** 2).sum() for n in start))

    assert distance(100.0) < 0.5 * distance(0.0)


def test_first_step_is_the_same_with_and_without_the_proximal_term() -> None:
    # at w = w_round the term's gradient is 0, so only later steps can differ
    plain, near = (
        tuned(1, settings=replace(SETTINGS, proximal_mu=mu))[0].state() for mu in (0.0, 100.0)
    )
    assert as_bytes(plain) == as_bytes(near)


def test_clipping_bounds_the_gradient_and_zero_switches_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def spy(parameters: list[torch.nn.Parameter], norm: float) -> torch.Tensor:
        calls.append(norm)
        return original(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    tuned(2, settings=replace(SETTINGS, max_grad_norm=0.0))
    assert calls == []
    tuned(2, settings=replace(SETTINGS, max_grad_norm=0.3))
    assert calls == [0.3, 0.3]


def test_warm_up_goes_on_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = rates_of_each_step(monkeypatch)
    settings = replace(SETTINGS, learning_rate=1.0, warmup_steps=4)
    tuned(2, first_step=0, settings=settings)
    tuned(4, first_step=2, settings=settings)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_batches_run_through_every_example_once_an_epoch() -> None:
    rows = np.concatenate([batch_rows(10, 4, step, seed=1) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10))
    assert sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])


def test_batches_larger_than_the_data_go_on_with_the_next_epoch() -> None:
    assert sorted(batch_rows(2, 5, 0, seed=1)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_any_batch_can_be_asked_for_by_itself() -> None:
    in_order = [batch_rows(7, 3, step, seed=2).tolist() for step in range(6)]
    assert batch_rows(7, 3, 4, seed=2).tolist() == in_order[4]


@pytest.mark.parametrize("method", ["ia3", "prompt", "none", "full"])
def test_every_method_trains(method: str) -> None:
    start, (result, stats) = tunable(method).state(), tuned(5, method=method)
    moved = [n for n, a in result.state().items() if a.tobytes() != start[n].tobytes()]
    assert len(moved) == len(start)
    assert stats.last_loss is not None
    assert np.isfinite(stats.last_loss)


def test_adapter_that_no_gradient_reaches_is_refused() -> None:
    left_out = tunable()
    decoder = left_out.model.get_submodule("base_model.model.model")
    decoder.layers = decoder.layers[1:5]  # type: ignore[index]
    with pytest.raises(AdapterError, match="no gradient reaches the adapter"):
        train(left_out, random_text(), SETTINGS, num_steps=1, first_step=0, seed=5)
