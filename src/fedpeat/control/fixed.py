"""The same plan in every round, for a drawn share of the devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeat.core.records import ClientPlan, RoundObservation, RoundPlan
from fedpeat.core.seeds import generator

__all__ = ["FixedController", "is_due"]


def is_due(every: int, server_round: int) -> bool:
    """Say whether emulators are aligned anew before a round.

    It is before a round and not after one, so that a run that ends here and is resumed for more
    rounds does what an uninterrupted one does.
    """
    return every > 0 and server_round > 1 and (server_round - 1) % every == 0


class FixedController:
    """Draws a share of the devices, uniformly, and gives each its rung and the same work.

    Args:
        rung: Emulator of the devices that ``client_rungs`` does not name.
        client_rungs: Emulators of devices, by the devices' names.
        fraction_train: Share of devices drawn, in (0, 1]; at least one.
        local_steps: Steps of each device.
        server_steps: Steps of the server; 0 if it does not take part.
        realign_every: Rounds from one alignment of the emulators to the next; 0 for none.
        seed: Seed of the draws.
        is_poisson: Whether each device is drawn by itself, with the share as its chance, so that
            who else is there says nothing of it; else the share is exact.
    """

    def __init__(
        self,
        *,
        rung: str,
        fraction_train: float,
        local_steps: int,
        server_steps: int,
        seed: int,
        realign_every: int = 0,
        client_rungs: Mapping[str, str] | None = None,
        is_poisson: bool = False,
    ) -> None:
        self._rung = rung
        self._client_rungs = dict(client_rungs or {})
        self._fraction_train = fraction_train
        self._local_steps = local_steps
        self._server_steps = server_steps
        self._seed = seed
        self._realign_every = realign_every
        self._is_poisson = is_poisson

    def plan(self, observation: RoundObservation) -> RoundPlan:
        """Return the plan of the coming round; it depends on the round's number alone."""
        names = [client.client_id for client in observation.clients]
        draw = self._drawn_each if self._is_poisson else self._drawn
        names = draw(names, observation.server_round)
        plans = tuple(
            ClientPlan(name, self._client_rungs.get(name, self._rung), self._local_steps)
            for name in names
        )
        realigns = is_due(self._realign_every, observation.server_round)
        return RoundPlan(plans, self._server_steps, realigns)

    def _drawn(self, names: list[str], server_round: int) -> list[str]:
        cohort_size = min(len(names), max(1, round(self._fraction_train * len(names))))
        rng = generator(self._seed, "cohort", server_round)
        drawn = sorted(rng.choice(len(names), cohort_size, replace=False).tolist())
        return [names[i] for i in drawn]

    def _drawn_each(self, names: list[str], server_round: int) -> list[str]:
        chances = (generator(self._seed, "drawn", server_round, name).random() for name in names)
        return [n for n, u in zip(names, chances, strict=True) if u < self._fraction_train]

    def state(self) -> Mapping[str, Any]:
        """Return an empty state: draws follow from seed and round."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Accept an empty state."""
        if state:
            raise ValueError(f"a fixed controller has no state, got {sorted(state)}")
