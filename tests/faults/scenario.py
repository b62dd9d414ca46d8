"""What goes wrong in a run, and when: drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "DEVICE_ROLES",
    "NUM_MASKED",
    "ODDITIES",
    "PHASES",
    "SERVER_ROLES",
    "Event",
    "Scenario",
    "drawn",
    "drawn_masked",
]

SERVER_ROLES = ("itself", "all", "superlink", "gate", "superexec", "serverapp")
DEVICE_ROLES = ("itself", "all", "supernode", "superexec", "clientapp")
ODDITIES = ("nan", "shape", "missing", "stale", "examples", "late", "full_disk", "joins_late")
NUM_MASKED = 5
"""Devices of a run with secure aggregation, of which two may be lost."""
PHASES = ("start", "run", "welcome", "round 1", "round 2")
_DELAY_SECONDS = {"start": 12.0, "run": 15.0, "welcome": 15.0, "round 1": 8.0, "round 2": 2.0}


@dataclass(frozen=True)
class Event:
    """Something that happens.

    Attributes:
        phase: After what, one of PHASES: the start, the process of the run being there, a device
            being welcomed, or a round's checkpoint.
        delay_seconds: How long after that.
        kind: kill, cut, hang, join or room.
        who: Name of the device; "server" for the server; empty for the network.
        role: Which program is killed.
        seconds: How long it lasts; after a kill, until the command is started again.
    """

    phase: str
    delay_seconds: float
    kind: str
    who: str = ""
    role: str = ""
    seconds: float = 2.0


@dataclass(frozen=True)
class Scenario:
    """The faults of one run.

    Attributes:
        seed: What they were drawn from.
        events: What happens.
        oddities: What is wrong with devices from the start, by name.
        names: All devices that have a key.
        hiding: How updates are hidden: not, by "masks" (secure aggregation) or by "noise".
    """

    seed: int
    events: tuple[Event, ...]
    oddities: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ("site-0", "site-1")
    hiding: str = ""

    @property
    def late_joiners(self) -> list[str]:
        return [event.who for event in self.events if event.kind == "join"]


def drawn(seed: int) -> Scenario:
    """Draw faults: at least one kill of a device and one of the server, at random moments.

    Which program is killed, and what else goes wrong, goes round with the seed, so that seeds in a
    row have all of it; who, when and how long is random.
    """
    rng = np.random.default_rng([seed, 5])

    def event(
        kind: str, who: str = "", role: str = "", *, last: int = len(PHASES), most: float = 4.0
    ) -> Event:
        phase = PHASES[rng.integers(last)]
        delay = float(rng.uniform(0, _DELAY_SECONDS[phase]))
        return Event(phase, delay, kind, who, role, float(rng.uniform(0.5, most)))

    events = [
        event("kill", "server", SERVER_ROLES[seed % len(SERVER_ROLES)]),
        event("kill", f"site-{rng.integers(2)}", DEVICE_ROLES[seed % len(DEVICE_ROLES)]),
    ]
    names: tuple[str, ...] = ("site-0", "site-1")
    oddities: dict[str, str] = {}
    extra = seed % 4
    if extra == 1:
        events.append(event("cut", most=20.0))
    elif extra == 2:
        events.append(event("hang", f"site-{rng.integers(2)}", most=40.0))
    elif extra == 3:
        names += ("site-2",)
        oddity = ODDITIES[(seed // 4) % len(ODDITIES)]
        if oddity == "joins_late":
            events.append(event("join", "site-2", last=4))
        else:
            oddities["site-2"] = oddity
        if oddity == "full_disk":
            events.append(Event("round 1", 0.0, "room", "site-2"))
    return Scenario(seed, tuple(events), oddities, names)


def drawn_masked(seed: int) -> Scenario:
    """Draw faults of a run with secure aggregation: one or two of five devices fall out of rounds.

    They are back soon or late, so that some are there again before their round is over, without the
    secrets that they had in it. With every third seed the server is killed as well.
    """
    rng = np.random.default_rng([seed, 6])
    names = tuple(f"site-{number}" for number in range(NUM_MASKED))

    def kill(who: str, role: str) -> Event:
        phase = PHASES[rng.integers(PHASES.index("welcome"), len(PHASES))]
        delay = float(rng.uniform(0, _DELAY_SECONDS[phase]))
        return Event(phase, delay, "kill", who, role, float(rng.uniform(0.5, 90.0)))

    fallen = rng.permutation(names)[: 1 + seed % 2]
    events = [
        kill(str(name), DEVICE_ROLES[(seed + i) % len(DEVICE_ROLES)])
        for i, name in enumerate(fallen)
    ]
    if seed % 3 == 2:
        events.append(kill("server", SERVER_ROLES[seed // 3 % len(SERVER_ROLES)]))
    return Scenario(seed, tuple(events), names=names, hiding="masks")
