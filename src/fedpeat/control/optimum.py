"""The best that could be done in a world small enough to try everything."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from fedpeat.control.process import Choices, FederationProcess
from fedpeat.core.errors import WorldError

__all__ = ["optimal_returns"]

_MOST_AT_ONCE = 50_000


def optimal_returns(process: FederationProcess) -> Float[np.ndarray, " worlds"]:
    """Return the best return of what is left of each episode, by trying every sequence of choices.

    Args:
        process: Where the episodes stand; it stays as it is. Nothing may be left to chance, which
            is so in still worlds.

    Raises:
        WorldError: If the world is not still.
    """
    if not process.world.settings.still:
        raise WorldError("an optimum can only be found in a world that is still")
    if int(process.episode.num_rounds.min()) >= process.settings.horizon:
        return np.zeros(process.num_worlds)
    options = _all_choices(process)
    count = len(options.realigns)
    size = max(1, _MOST_AT_ONCE // count)
    starts = range(0, process.num_worlds, size)
    rows = [np.arange(start, min(start + size, process.num_worlds)) for start in starts]
    return np.concatenate([_best(process, some, options, count) for some in rows])


def _best(
    process: FederationProcess, rows: Int[np.ndarray, " some"], options: Choices, count: int
) -> Float[np.ndarray, " some"]:
    """Return the best return of some of the worlds."""
    many = process.picked(np.repeat(rows, count))
    repeats = {
        name: np.tile(array, (len(rows), *[1] * (array.ndim - 1)))
        for name, array in vars(options).items()
        if array is not None
    }
    demand = many.demand(replace(options, **repeats))
    cost = many.world.run_round(demand)
    after = many.loss_after(demand, cost.finished)
    rewards = many.rewards(cost, after)
    many.settle(demand, cost, after)
    return np.asarray((rewards + optimal_returns(many)).reshape(len(rows), count).max(-1))


def _all_choices(process: FederationProcess) -> Choices:
    """Return all that can be chosen in a round: one row for each, what is out all the same."""
    settings, branches = process.settings, process.branches
    sizes = [size for name, size in branches.device.items() if name != "takes_part"]
    active = [(1, *rest) for rest in itertools.product(*map(range, sizes))]
    device = [(0, *[0] * len(sizes)), *active]
    realigns = (0, 1) if settings.realigns else (0,)
    server = list(itertools.product(range(len(settings.server_steps)), realigns))
    rows = list(itertools.product(itertools.product(device, repeat=process.num_devices), server))
    devices = np.array([one for one, _ in rows])
    of_server = np.array([other for _, other in rows])
    chosen = {name: devices[..., place] for place, name in enumerate(branches.device)}
    return Choices(
        takes_part=chosen["takes_part"] == 1,
        rung=chosen["rung"],
        local_steps=chosen["local_steps"],
        bandwidth=chosen.get("bandwidth"),
        server_steps=of_server[:, 0],
        realigns=of_server[:, 1] == 1,
    )
