"""The updates that a server sees, made anew for an audit: one device's, or a cohort's together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from fedpeat.adapter.lora import State
from fedpeat.adapter.tunable import Tunable
from fedpeat.core.noise import NoiseSource
from fedpeat.core.seeds import derive_seed
from fedpeat.data.packing import PackedText
from fedpeat.federated.accounting import epsilon_of
from fedpeat.federated.aggregation import update_norm
from fedpeat.tuning.local import LocalSettings, batch_rows, train
from fedpeat.tuning.private import ExamplePrivacy, sample_rate

__all__ = ["DEFENCES", "Seen", "Training", "Victim", "seen_by_server"]

DEFENCES = ("none", "example_level", "secure_aggregation", "client_level")
"""What stands between a device's data and the server; the last two show it a sum alone."""


@dataclass(frozen=True)
class Training:
    """How each device of an audit trains in a round.

    Attributes:
        settings: As in the run.
        num_steps: Steps.
        example_noise: Noise multiplier at example level, where that is the defence.
        example_clip_norm: Norm of an example's gradient there.
        client_noise: Noise multiplier at client level, where that is the defence.
        client_clip_norm: Norm of an update there; the median of the updates' if None.
        delta: Delta of the epsilons.
        seed: Seed of the audit.
    """

    settings: LocalSettings
    num_steps: int
    example_noise: float
    example_clip_norm: float
    client_noise: float
    client_clip_norm: float | None
    delta: float
    seed: int


@dataclass(frozen=True)
class Victim:
    """One device in an audit.

    Attributes:
        name: Its name.
        text: What it trains on.
        others: What is like it, and was not trained on.
    """

    name: str
    text: PackedText
    others: PackedText


@dataclass(frozen=True)
class Seen:
    """What the server sees of some devices.

    Attributes:
        update: What was added to the adapter: by one device, or by all of them together.
        members: Rows of each device's text that are in it, by the device's name.
        epsilon: What was promised, to an example or to a device; None if nothing was.
    """

    update: Mapping[str, np.ndarray]
    members: Mapping[str, Int[np.ndarray, " rows"]]
    epsilon: float | None


def seen_by_server(
    tunable: Tunable, start: State, victims: Sequence[Victim], training: Training
) -> dict[str, list[Seen]]:
    """Return what the server sees in a round, by defence: an update of each device, or one of all.

    Args:
        tunable: The emulator that devices hold.
        start: The round's adapter.
        victims: The devices.
        training: How they train.
    """
    open_, hidden = (
        [_one(tunable, start, victim, training, is_private=is_private) for victim in victims]
        for is_private in (False, True)
    )
    members = {name: rows for seen in open_ for name, rows in seen.members.items()}
    together = Seen(_sum([seen.update for seen in open_]), members, None)
    noised = Seen(
        _noised_sum([seen.update for seen in open_], training),
        members,
        epsilon_of({(training.client_noise, 1.0): 1}, training.delta),
    )
    return dict(zip(DEFENCES, (open_, hidden, [together], [noised]), strict=True))


def _noised_sum(updates: Sequence[State], training: Training) -> dict[str, np.ndarray]:
    """Return the sum of updates, each clipped, with the server's noise."""
    norms = [_norm(update) for update in updates]
    bound = training.client_clip_norm or float(np.median(norms))
    clipped = [
        {name: array * (min(1.0, bound / norm) if norm else 1.0) for name, array in update.items()}
        for update, norm in zip(updates, norms, strict=True)
    ]
    noise = NoiseSource.of_seed(derive_seed(training.seed, "audit", "client noise"))
    scale = training.client_noise * bound
    return {n: a + scale * noise.normal(a.shape, n) for n, a in _sum(clipped).items()}


def _one(
    tunable: Tunable, start: State, victim: Victim, training: Training, *, is_private: bool
) -> Seen:
    """Return one device's update."""
    settings = training.settings
    if is_private:
        settings = replace(
            settings,
            noise_multiplier=training.example_noise,
            example_clip_norm=training.example_clip_norm,
        )
    seed = derive_seed(training.seed, "audit", victim.name)
    noise = NoiseSource.of_seed(seed)
    tunable.load(start)
    train(
        tunable,
        victim.text,
        settings,
        num_steps=training.num_steps,
        first_step=0,
        seed=seed,
        noise=noise,
    )
    end = tunable.state()
    update = {name: end[name].astype(np.float64) - start[name] for name in start}
    rows = _rows(victim.text, settings, training.num_steps, seed, noise if is_private else None)
    epsilon = None
    if is_private:
        rate = sample_rate(victim.text.num_examples, settings.batch_size)
        epsilon = epsilon_of(
            {(settings.noise_multiplier, rate): training.num_steps}, training.delta
        )
    return Seen(update, {victim.name: rows}, epsilon)


def _rows(
    text: PackedText,
    settings: LocalSettings,
    num_steps: int,
    seed: int,
    noise: NoiseSource | None,
) -> Int[np.ndarray, " rows"]:
    """Return the rows that a training saw."""
    if noise is None:
        batches = [
            batch_rows(text.num_examples, settings.batch_size, step, seed)
            for step in range(num_steps)
        ]
    else:
        privacy = ExamplePrivacy(settings.example_clip_norm, settings.noise_multiplier, noise)
        batches = [
            privacy.rows(text.num_examples, settings.batch_size, step) for step in range(num_steps)
        ]
    return np.unique(np.concatenate(batches))


def _sum(updates: Sequence[State]) -> dict[str, np.ndarray]:
    return {name: np.sum([u[name] for u in updates], axis=0) for name in updates[0]}


def _norm(update: State) -> float:
    return update_norm(update, {name: np.zeros_like(array) for name, array in update.items()})
