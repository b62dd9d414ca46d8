"""Privacy by choice: what is promised to an example on its device, and to a device as a whole.

Example level: devices hide each of their examples from everybody, the server included, by noise in
their local steps (``tuning/private.py``). Client level: the server, which is trusted with the
updates, hides each device from all who see adapters, by noise on the sum of clipped updates. The
server's own update is made of the server's data, which neither hides.

What epsilon covers is the adapters. The run folder holds more (losses of devices, norms) and is the
server's own. How many examples a device has is not hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpeat.adapter.lora import State
from fedpeat.core.noise import NoiseSource
from fedpeat.core.records import RoundPlan
from fedpeat.federated.accounting import epsilon_of, noise_for
from fedpeat.federated.robust import Averaged
from fedpeat.tuning.local import LocalSettings
from fedpeat.tuning.private import sample_rate

__all__ = ["ClientLevel", "ExampleLevel", "Privacy", "Steps"]

Steps = Mapping[str, Mapping[str, int]]
"""Local steps that devices were asked for so far, by device and by its number of examples."""


@dataclass(frozen=True)
class ExampleLevel:
    """What devices promise their examples.

    Attributes:
        batch_size: Examples that a step is expected to see.
        clip_norm: Norm of an example's gradient.
        noise_multiplier: Noise in units of it; None to go by the epsilon.
        target_epsilon: Epsilon that a device reaches if it makes all steps; None for none.
        num_steps: Those steps.
        delta: Chance with which the promise may be broken.
    """

    batch_size: int
    clip_norm: float
    noise_multiplier: float | None
    target_epsilon: float | None
    num_steps: int
    delta: float

    def noise_of(self, num_examples: int) -> float:
        """Return the noise multiplier of a device."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None, "the settings are checked"
        rate = sample_rate(num_examples, self.batch_size)
        return noise_for(self.target_epsilon, rate, self.num_steps, self.delta)

    def settings(self, settings: LocalSettings, num_examples: int) -> LocalSettings:
        """Return how a device trains."""
        return replace(
            settings,
            noise_multiplier=self.noise_of(num_examples),
            example_clip_norm=self.clip_norm,
        )

    def after(
        self, steps: Steps, plan: RoundPlan, num_examples: Mapping[str, int]
    ) -> dict[str, dict[str, int]]:
        """Return the steps after a round: those of all who were asked, if they answered or not.

        Args:
            steps: Steps before the round.
            plan: Who was asked for how many.
            num_examples: Examples of each device.
        """
        after = {name: dict(made) for name, made in steps.items()}
        for client in plan.cohort:
            if not client.lost:
                made = after.setdefault(client.client_id, {})
                key = str(num_examples[client.client_id])
                made[key] = made.get(key, 0) + client.local_steps
        return after

    def epsilon(self, made: Mapping[str, int]) -> float:
        """Return the epsilon of a device, from its steps by its number of examples."""
        spent: dict[tuple[float, float], int] = {}
        for text, count in made.items():
            num_examples = int(text)
            key = self.noise_of(num_examples), sample_rate(num_examples, self.batch_size)
            spent[key] = spent.get(key, 0) + count
        return epsilon_of(spent, self.delta)


@dataclass(frozen=True)
class ClientLevel:
    """What the server promises each device.

    Attributes:
        clip_norm: Norm that updates are clipped to.
        noise_multiplier: Noise on their sum, in units of the norm.
        rate: Chance of a device to be in a round, each by itself; 1 where devices are chosen any
            other way, since what is not secretly drawn hides nothing.
        num_clients: Devices of the federation.
        server_ratio: Share of the server in the average; None to count as one more device.
        delta: Chance with which the promise may be broken.
        noise: The server's noise.

    Source:
        McMahan et al. (2018), Learning differentially private recurrent language models, algorithm
        1 with the estimator of a fixed denominator.
    """

    clip_norm: float
    noise_multiplier: float
    rate: float
    num_clients: int
    server_ratio: float | None
    delta: float
    noise: NoiseSource

    def cohort_size(self, plan: RoundPlan) -> float:
        """Return what the sum is divided by: nothing that depends on who answered."""
        expected = self.rate * self.num_clients if self.rate < 1 else len(plan.cohort)
        return max(1.0, expected)

    def noised(self, total: State, server_round: int) -> dict[str, np.ndarray]:
        """Return the sum of clipped updates with the noise of a round on it."""
        scale = self.noise_multiplier * self.clip_norm
        return {
            name: array + scale * self.noise.normal(array.shape, "sum", server_round, name)
            for name, array in total.items()
        }

    def average(
        self,
        states: Sequence[State],
        trusted: Sequence[bool],
        held: State,
        plan: RoundPlan,
        server_round: int,
    ) -> Averaged:
        """Return the average of a round: devices alike, their sum noised, the server beside it.

        Args:
            states: Tensors of each participant, clipped.
            trusted: Whether each is the server.
            held: The round's tensors that devices tune.
            plan: The round's plan.
            server_round: The round.
        """
        cohort_size = self.cohort_size(plan)
        total = {name: np.zeros(array.shape) for name, array in held.items()}
        for state, is_server in zip(states, trusted, strict=True):
            if not is_server:
                for name, update in self._within(state, held).items():
                    total[name] += update
        mean = {
            name: held[name] + noisy / cohort_size
            for name, noisy in self.noised(total, server_round).items()
        }
        ratio = 1 / (1 + cohort_size) if self.server_ratio is None else self.server_ratio
        own = next((s for s, is_server in zip(states, trusted, strict=True) if is_server), None)
        if own is not None:
            mean = {n: ratio * own[n] + (1 - ratio) * mean[n] for n in mean} | {
                n: array for n, array in own.items() if n not in mean
            }
        each = (1 - ratio if own is not None else 1.0) / cohort_size
        tensors = {name: np.asarray(a, dtype=np.float32) for name, a in mean.items()}
        return Averaged(tensors, [ratio if is_server else each for is_server in trusted])

    def _within(self, state: State, held: State) -> dict[str, np.ndarray]:
        """Return an update within the norm exactly: rounding may have moved it out a little."""
        update = {name: state[name].astype(np.float64) - array for name, array in held.items()}
        norm = float(np.sqrt(sum(np.sum(u**2) for u in update.values())))
        ratio = min(1.0, self.clip_norm / norm) if norm else 1.0
        return {name: ratio * array for name, array in update.items()}

    def epsilon(self, num_rounds: int) -> float:
        """Return the epsilon of a device after some rounds."""
        return epsilon_of({(self.noise_multiplier, self.rate): num_rounds}, self.delta)


@dataclass(frozen=True)
class Privacy:
    """What a federation promises; None where nothing is."""

    example: ExampleLevel | None = None
    client: ClientLevel | None = None

    def record(self, steps: Steps, num_rounds: int) -> dict[str, float]:
        """Return what was spent so far, as it goes into metrics.jsonl; empty if nothing is hidden.

        Args:
            steps: Local steps of the devices so far.
            num_rounds: Rounds so far.
        """
        record: dict[str, float] = {}
        if self.example is not None:
            spent = [self.example.epsilon(made) for made in steps.values()]
            record |= {"example_epsilon": max(spent, default=0.0), "delta": self.example.delta}
        if self.client is not None:
            record |= {
                "client_epsilon": self.client.epsilon(num_rounds),
                "client_sample_rate": self.client.rate,
                "delta": self.client.delta,
            }
        return record
