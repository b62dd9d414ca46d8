"""A planner steers a real federation, whose devices are those of a simulated world.

Training, the exchange of emulators and the quality are real; the world says who is there and has
the memory, what a round costs in time and energy, and whose update is lost on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedpeat.control.planners import Planner
from fedpeat.control.process import COSTS, FederationProcess
from fedpeat.core.errors import WorldError
from fedpeat.core.records import ClientPlan, RoundObservation, RoundPlan
from fedpeat.mec.world import Demand, RoundCost

__all__ = ["SteeringController"]


class SteeringController:
    """Plans rounds as a planner chooses in one world.

    Args:
        process: One world, with as many devices as the federation has.
        planner: Who chooses.
        client_ids: Names of the devices, in the order of the world's.

    Raises:
        WorldError: If the world is not one of as many devices.
    """

    def __init__(
        self, process: FederationProcess, planner: Planner, client_ids: Sequence[str]
    ) -> None:
        if (process.num_worlds, process.num_devices) != (1, len(client_ids)):
            raise WorldError(
                f"to steer {len(client_ids)} devices a process must be one world with as many, got "
                f"{process.num_worlds} with {process.num_devices}"
            )
        self.process = process
        self._planner = planner
        self._client_ids = list(client_ids)

    def plan(self, observation: RoundObservation) -> RoundPlan:
        """Return the plan of the coming round, which passes in the simulated world at once."""
        process = self.process
        reached = self._look(observation)
        choices = self._planner.choose(process)
        demand = process.demand(replace(choices, takes_part=choices.takes_part & reached))
        cost = process.world.run_round(demand)
        process.settle(demand, cost, process.episode.loss)  # its loss comes with the next look
        return RoundPlan(
            cohort=self._cohort(demand, cost),
            server_steps=int(demand.server_steps[0]),
            realigns=bool(demand.realigns[0]),
            simulated=dict(zip(COSTS, cost.totals[0].tolist(), strict=True)),
        )

    def state(self) -> Mapping[str, Any]:
        """Return where the simulated world stands."""
        return self.process.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.process.load_state(state)

    def _look(self, observation: RoundObservation) -> np.ndarray:
        """Take in what the server knows; return who could be reached (1, devices)."""
        episode = self.process.episode
        known = {client.client_id: client.num_examples for client in observation.clients}
        examples = [
            known.get(name, old)
            for name, old in zip(self._client_ids, episode.examples[0].tolist(), strict=True)
        ]
        loss = episode.loss if observation.loss is None else np.array([observation.loss])
        last_loss = episode.last_loss
        if observation.server_round == 1:
            last_loss = np.broadcast_to(loss[:, None], last_loss.shape)
        self.process.episode = replace(
            episode,
            loss=loss,
            last_loss=last_loss,
            examples=np.maximum(np.array([examples], dtype=np.float64), 1.0),
        )
        return np.array([[name in known for name in self._client_ids]])

    def _cohort(self, demand: Demand, cost: RoundCost) -> tuple[ClientPlan, ...]:
        rungs = [rung.name for rung in self.process.workload.rungs]
        return tuple(
            ClientPlan(
                name,
                rungs[demand.rung[0, place]],
                int(demand.local_steps[0, place]),
                "" if cost.finished[0, place] else "lost on the way, as the simulated world has it",
            )
            for place, name in enumerate(self._client_ids)
            if demand.takes_part[0, place]
        )
