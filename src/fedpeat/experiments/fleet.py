"""The server's run on a fleet, as Flower starts it: the same run, with devices elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from fedpeat.config.loading import load_config
from fedpeat.config.schema import Config
from fedpeat.core.errors import FedPEATError
from fedpeat.core.records import Reply, Transport
from fedpeat.core.run_folder import write_atomically
from fedpeat.experiments.bench import Fleet
from fedpeat.experiments.fleet_folder import FLEET_VARIABLE, FleetFolder
from fedpeat.experiments.news import NewsWriter
from fedpeat.experiments.run import run
from fedpeat.federated.flower.depot import Depot

__all__ = ["Patient", "least_devices", "run_on"]

_CRASHED = 1
_MOST_NAMED = 8

Reach = Callable[[Callable[[], object]], Transport]
"""Returns how devices are reached, given what to call whenever messages were sent to them."""


def run_on(reach: Reach) -> None:
    """Run, or go on with, what the folder of the fleet says; leave word of how it ended there."""
    fleet = FleetFolder(Path(os.environ[FLEET_VARIABLE]))
    config = load_config(fleet.config)
    write_atomically(fleet.process, json.dumps({"pid": os.getpid()}))
    names = tuple(json.loads(fleet.devices.read_text()))
    wanted = len(names) if config.fleet.wait_for is None else config.fleet.wait_for
    depot = Depot(fleet.parts, fleet.parts_secret)
    news = NewsWriter(fleet.news)
    waiting = Patient(reach(fleet.ring), names, wanted, least_devices(config), news.message)
    outcome = {"exit_code": 0, "error": ""}
    try:
        reached = Fleet(waiting, depot.offer, names, fleet.ca.read_bytes())
        run(config, resume=True, observer=news, fleet=reached)
    except FedPEATError as error:
        outcome = {"exit_code": error.exit_code, "error": str(error)}
    except Exception as error:  # noqa: BLE001 - the supervisor is told, and tries again
        outcome = {"exit_code": _CRASHED, "error": f"{type(error).__name__}: {error}"}
    write_atomically(fleet.outcome, json.dumps(outcome))


def least_devices(config: Config) -> int:
    """Return how many devices a round may begin with: with the server's update they are enough."""
    own = config.server.participates and config.data.server_ratio > 0
    return max(1, config.federated.min_clients - own)


class Patient:
    """A transport that waits for devices rather than begin a round without them.

    Args:
        inner: How devices are reached.
        names: Devices that may take part; others have had a key once.
        first: How many must be there before the first round.
        least: How many before any other.
        say: Is told who is there while others are waited for.
    """

    def __init__(
        self,
        inner: Transport,
        names: Collection[str],
        first: int,
        least: int,
        say: Callable[[str], object],
    ) -> None:
        self._inner = inner
        self._say = say
        self._names = frozenset(names)
        self._wanted, self._least = first, least
        self.interval_seconds = inner.interval_seconds

    def nodes(self) -> list[str]:
        """Return the devices that are online, once there are enough."""
        told = None
        while len(nodes := self._known()) < self._wanted:
            if (here := sorted(nodes)) != told:
                named = f": {', '.join(here[:_MOST_NAMED])}" if here else ""
                self._say(f"waiting for devices, {len(here)} of {self._wanted} are here{named}")
                told = here
            time.sleep(self.interval_seconds)
        self._wanted = self._least
        return nodes

    def _known(self) -> list[str]:
        return [node for node in self._inner.nodes() if node in self._names]

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Send tasks."""
        return self._inner.submit(kind, tasks, deadline_seconds)

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Return the replies that have come."""
        return self._inner.poll(tickets)
