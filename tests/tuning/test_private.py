"""DP-SGD in the local steps: each example clipped, noise on the sum, nothing else told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.core.noise import NoiseSource
from fedpeat.data.packing import PackedText
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.local import LocalSettings, train
from fedpeat.tuning.private import ExamplePrivacy, refuse_mixing, sample_rate
from tiny import random_text, tiny_model

KEY = NoiseSource(bytes(32))
TEXT = random_text(num_blocks=6)


def tunable(method: str = "lora") -> Tunable:
    model = tiny_model("llama", num_blocks=2)
    config = AdapterConfig(method=method, num_bottom=1, num_top=1, r=2)  # type: ignore[arg-type]
    return attach(model, find_blocks(model), [0, 1], config)


def gradients(
    clip_norm: float,
    noise_multiplier: float,
    rows: list[int],
    method: str = "lora",
    batch_size: int = 4,
) -> dict[str, np.ndarray]:
    network = tunable(method)
    privacy = ExamplePrivacy(clip_norm, noise_multiplier, KEY)
    privacy.put_gradients(network, TEXT, np.array(rows, dtype=np.int64), batch_size, step=0)
    return {n: p.grad.numpy().copy() for n, p in network.parameters.items() if p.grad is not None}


def of_one(row: int, method: str = "lora") -> dict[str, np.ndarray]:
    """Return the gradient of one example, by the network's own loss."""
    network = tunable(method)
    ids = torch.from_numpy(TEXT.input_ids[[row]].astype(np.int64))
    network.model(input_ids=ids, labels=ids).loss.backward()
    return {
        n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for n, p in network.parameters.items()
    }


def norm_of(update: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in update.values())))


@pytest.mark.parametrize("method", ["lora", "ia3", "none"])
def test_each_example_is_clipped_by_itself_and_the_sum_is_over_the_expected_batch(
    method: str,
) -> None:
    ones = [of_one(row, method) for row in (0, 3)]
    bound = (norm_of(ones[0]) + norm_of(ones[1])) / 2  # the larger one is clipped, the other not
    ratios = [min(1, bound / norm_of(one)) for one in ones]
    assert sorted(ratio < 1 for ratio in ratios) == [False, True]
    found = gradients(bound, 0.0, [0, 3], method)
    for name, array in found.items():
        want = sum(ratio * one[name] for ratio, one in zip(ratios, ones, strict=True)) / 4
        np.testing.assert_allclose(array, want, atol=1e-6 * bound)


def test_one_example_moves_the_sum_by_the_clip_norm_at_most() -> None:
    without, with_it = gradients(1e-3, 0.0, [1, 2]), gradients(1e-3, 0.0, [1, 2, 5])
    moved = {n: 4 * (with_it[n].astype(np.float64) - without[n]) for n in without}
    assert norm_of(moved) == pytest.approx(1e-3, rel=1e-4)


def test_noise_has_the_multiple_of_the_clip_norm_and_comes_without_examples_too() -> None:
    drawn = np.concatenate([a.ravel() for a in gradients(0.5, 3.0, []).values()])
    assert len(drawn) > 1000
    assert drawn.std() == pytest.approx(3.0 * 0.5 / 4, rel=0.05)
    assert abs(drawn.mean()) < 0.02


def test_noise_is_on_top_of_the_clipped_sum() -> None:
    noisy, plain, noise = (
        gradients(0.5, 3.0, [0]),
        gradients(0.5, 0.0, [0]),
        gradients(0.5, 3.0, []),
    )
    for name in noisy:
        np.testing.assert_allclose(noisy[name], plain[name] + noise[name], atol=1e-6)


def test_no_two_tensors_and_no_two_steps_have_the_same_noise() -> None:
    network = tunable()
    drawn = []
    for step in (0, 1):
        ExamplePrivacy(1.0, 1.0, KEY).put_gradients(network, TEXT, np.array([], int), 4, step)
        drawn += [p.grad.numpy().ravel() for p in network.parameters.values() if p.grad is not None]
    every = np.concatenate(drawn)
    assert len(np.unique(every)) > 0.999 * len(every)


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    gradient = [torch.tensor([np.nan, 1.0]), torch.ones(2)]
    found = ExamplePrivacy(1.0, 1.0, KEY)._clipped(gradient)  # noqa: SLF001 - no text makes one
    assert [g.tolist() for g in found] == [[0, 0], [0, 0]]


def test_examples_are_drawn_each_by_itself_with_the_rate() -> None:
    privacy = ExamplePrivacy(1.0, 1.0, KEY)
    sizes = np.array([len(privacy.rows(100, 10, step)) for step in range(2000)])
    assert sizes.mean() == pytest.approx(10, abs=0.3)
    assert sizes.var() == pytest.approx(100 * 0.1 * 0.9, rel=0.15)  # binomial, not a fixed size
    assert len(privacy.rows(5, 10, 0)) == 5
    assert (sample_rate(100, 10), sample_rate(5, 10)) == (0.1, 1.0)


# --- in the local steps ---------------------------------------------------------------------------

SETTINGS = LocalSettings(
    batch_size=4, learning_rate=1e-2, noise_multiplier=1.0, example_clip_norm=0.1
)


def trained(
    noise: NoiseSource = KEY,
    settings: LocalSettings = SETTINGS,
    text: PackedText = TEXT,
    steps: tuple[int, int] = (0, 3),
    seed: int = 5,
) -> tuple[bytes, object]:
    network = tunable()
    first, num_steps = steps
    stats = train(
        network, text, settings, num_steps=num_steps, first_step=first, seed=seed, noise=noise
    )
    return b"".join(a.tobytes() for a in network.state().values()), stats


def test_losses_are_not_told() -> None:
    _, stats = trained()
    told = (stats.first_loss, stats.last_loss, stats.mean_loss)  # type: ignore[attr-defined]
    assert told == (None, None, None)
    assert stats.num_tokens == 3 * 4 * 16  # type: ignore[attr-defined] # expected, not drawn


def test_the_same_noise_gives_the_same_update_and_no_other_does() -> None:
    update, _ = trained()
    assert trained()[0] == update
    assert trained(NoiseSource(bytes(31) + b"1"))[0] != update


def test_batches_do_not_follow_the_seed_that_the_server_knows() -> None:
    assert trained(seed=6)[0] == trained(seed=5)[0]


def test_the_proximal_term_still_counts_and_needs_no_noise() -> None:
    assert trained(settings=replace(SETTINGS, proximal_mu=10.0))[0] != trained()[0]


def test_training_without_noise_has_no_use_for_a_source() -> None:
    plain = replace(SETTINGS, noise_multiplier=0.0)
    assert trained(settings=plain)[0] == trained(NoiseSource.fresh(), settings=plain)[0]


def test_a_network_that_mixes_examples_is_refused() -> None:
    mixing = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(AdapterError, match=r"do not mix examples, got 1 \(batch normalisation\)"):
        refuse_mixing(mixing)
    refuse_mixing(nn.LayerNorm(2))
