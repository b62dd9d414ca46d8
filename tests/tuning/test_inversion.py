"""Texts read back from an update: the one that was tuned on, not one of noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.data.packing import PackedText
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.inversion import Inversion, invert
from fedpeat.tuning.local import LocalSettings, train
from fedpeat.tuning.measures import rouge_l
from tiny import random_text, tiny_model

LENGTH = 10
SETTINGS = Inversion(LENGTH, width=16)


def tunable() -> Tunable:
    model = tiny_model("llama", num_blocks=2)
    return attach(
        model, find_blocks(model), [0, 1], AdapterConfig(num_bottom=1, num_top=1, r=8), seed=1
    )


def update_of(seed: int, num_steps: int = 20) -> tuple[PackedText, dict[str, np.ndarray]]:
    """Return a text, and what tuning on it adds to the adapter."""
    text = random_text(num_blocks=1, seed=seed)
    text = PackedText(
        text.input_ids[:, :LENGTH], text.loss_mask[:, :LENGTH], text.token_bytes[:, :LENGTH]
    )
    network = tunable()
    start = network.state()
    settings = LocalSettings(batch_size=1, learning_rate=1e-2)
    train(network, text, settings, num_steps=num_steps, first_step=0, seed=0)
    end = network.state()
    return text, {name: end[name] - start[name] for name in start}


def likeness(found: list[int], text: PackedText) -> float:
    return rouge_l([str(t) for t in found], [str(t) for t in text.input_ids[0].tolist()])


def test_the_text_of_an_update_is_read_back() -> None:
    text, update = update_of(seed=3)
    network = tunable()
    start = network.state()
    (found,) = invert(network, start, update, 1, SETTINGS)
    assert len(found) == LENGTH
    assert likeness(found, text) >= 0.7
    assert all((network.state()[n] == start[n]).all() for n in start)


def test_from_noise_or_another_update_nothing_of_it_is_read() -> None:
    text, update = update_of(seed=3)
    _, other = update_of(seed=4)
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.mean([np.mean(a**2) for a in update.values()]))
    noise = {n: scale * rng.normal(size=a.shape).astype(np.float32) for n, a in update.items()}
    for useless in (noise, other):
        (found,) = invert(tunable(), tunable().state(), useless, 1, SETTINGS)
        assert likeness(found, text) <= 0.2


def test_another_text_is_found_each_time() -> None:
    _, update = update_of(seed=3)
    one, other = invert(tunable(), tunable().state(), update, 2, SETTINGS)
    assert set(itertools.pairwise(one)).isdisjoint(itertools.pairwise(other))


def test_no_pair_of_tokens_comes_twice() -> None:
    _, update = update_of(seed=3)
    (found,) = invert(tunable(), tunable().state(), update, 1, Inversion(25, width=4))
    pairs = list(itertools.pairwise(found))
    assert len(set(pairs)) == len(pairs) == 24


@pytest.mark.parametrize("width", [1, 400])
def test_any_width_gives_one_text_of_the_length(width: int) -> None:
    _, update = update_of(seed=3, num_steps=1)
    (found,) = invert(tunable(), tunable().state(), update, 1, Inversion(4, width=width))
    assert len(found) == 4
