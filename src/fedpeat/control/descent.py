"""The best round by itself: block-coordinate descent over what each device and the server do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedpeat.control.planners import Planner
from fedpeat.control.process import Choices, FederationProcess
from fedpeat.mec.quality import QualityModel

__all__ = ["CoordinateDescent"]


class CoordinateDescent:
    """Improves what another planner chooses, one participant at a time.

    It knows the world and the mean of the models of quality, looks one round ahead, and takes for
    each device, and then for the server, what is worth most while the others stay as they are.

    Args:
        start: Whose choices it begins with.
        num_sweeps: How often it goes through all participants.

    Source:
        Tseng (2001), Convergence of a block coordinate descent method for nondifferentiable
        minimization.
    """

    def __init__(self, start: Planner, num_sweeps: int = 2) -> None:
        self._start = start
        self._num_sweeps = num_sweeps

    def choose(self, process: FederationProcess) -> Choices:
        """Return what everyone is to do in the coming round."""
        choices = self._start.choose(process)
        quality = process.quality.mean()
        worth = self._worth(process, quality, choices)
        for _ in range(self._num_sweeps):
            for other in (*range(process.num_devices), None):
                for candidate in _changes(process, choices, other):
                    gained = self._worth(process, quality, candidate)
                    better = gained > worth
                    choices = _merged(better, candidate, choices)
                    worth = np.where(better, gained, worth)
        return choices

    @staticmethod
    def _worth(process: FederationProcess, quality: QualityModel, choices: Choices) -> np.ndarray:
        demand = process.demand(choices)
        cost = process.world.price(demand)
        after = process.loss_after(demand, cost.finished, quality)
        return process.rewards(cost, after)


def _changes(process: FederationProcess, choices: Choices, device: int | None) -> Iterator[Choices]:
    """Change what one device does, or the server, to everything that it could do."""
    settings = process.settings
    if device is None:
        realigns = (False, True) if settings.realigns else (False,)
        for steps, aligned in itertools.product(range(len(settings.server_steps)), realigns):
            yield replace(
                choices,
                server_steps=np.full_like(choices.server_steps, steps),
                realigns=np.full_like(choices.realigns, aligned),
            )
        return
    yield _set(choices, device, takes_part=False)
    rungs, steps_of = range(process.workload.num_rungs), range(len(settings.local_steps))
    for rung, steps in itertools.product(rungs, steps_of):
        yield _set(choices, device, takes_part=True, rung=rung, local_steps=steps)


def _set(choices: Choices, device: int, **values: int) -> Choices:
    changed = {}
    for name, value in values.items():
        changed[name] = getattr(choices, name).copy()
        changed[name][:, device] = value
    return replace(choices, **changed)


def _merged(which: np.ndarray, new: Choices, old: Choices) -> Choices:
    """Return the new choices in some of the worlds."""
    arrays = {}
    for name, now in vars(new).items():
        if now is not None:
            before = getattr(old, name)
            arrays[name] = np.where(which.reshape(-1, *[1] * (now.ndim - 1)), now, before)
    return replace(old, **arrays)
