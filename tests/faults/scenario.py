"""What goes wrong in a run, and when: drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["DEVICE_ROLES", "ODDITIES", "SERVER_ROLES", "Event", "Scenario", "drawn"]

SERVER_ROLES = ("itself", "all", "superlink", "gate", "superexec", "serverapp")
DEVICE_ROLES = ("itself", "all", "supernode", "superexec", "clientapp")
ODDITIES = ("nan", "shape", "missing", "stale", "examples", "late", "full_disk", "joins_late")
_MOST_WAIT_SECONDS = 90.0


@dataclass(frozen=True, order=True)
class Event:
    """Something that happens.

    Attributes:
        at: Seconds after the fleet was started.
        kind: kill, cut, mend, hang, go_on, join or room.
        who: Name of the device; "server" for the server; empty for the network.
        role: Which program is killed.
        restart_seconds: When a command that was killed is started again.
    """

    at: float
    kind: str
    who: str = ""
    role: str = ""
    restart_seconds: float = 2.0


@dataclass(frozen=True)
class Scenario:
    """The faults of one run.

    Attributes:
        seed: What they were drawn from.
        events: What happens, in the order of time.
        oddities: What is wrong with devices from the start, by name.
        names: All devices that have a key.
    """

    seed: int
    events: tuple[Event, ...]
    oddities: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ("site-0", "site-1")

    @property
    def late_joiners(self) -> list[str]:
        return [event.who for event in self.events if event.kind == "join"]


def drawn(seed: int, seconds: float = _MOST_WAIT_SECONDS) -> Scenario:
    """Draw faults: at least one kill of a device and one of the server, at random moments.

    Which program is killed, and what else goes wrong, changes from seed to seed so that ten
    seeds in a row have each of them; the moments are random.

    Args:
        seed: Where all draws begin.
        seconds: Time in which things happen, from the start on [s].
    """
    rng = np.random.default_rng([seed, 5])
    device = f"site-{rng.integers(2)}"
    events = [
        Event(
            float(rng.uniform(3, seconds)),
            "kill",
            "server",
            SERVER_ROLES[seed % len(SERVER_ROLES)],
            float(rng.uniform(0.5, 4)),
        ),
        Event(
            float(rng.uniform(3, seconds)),
            "kill",
            device,
            DEVICE_ROLES[seed % len(DEVICE_ROLES)],
            float(rng.uniform(0.5, 4)),
        ),
    ]
    names, oddities = ("site-0", "site-1"), {}
    extra = seed % 4
    if extra == 1:
        start = float(rng.uniform(5, seconds))
        events += [Event(start, "cut"), Event(start + float(rng.uniform(2, 20)), "mend")]
    elif extra == 2:
        start, other = float(rng.uniform(10, seconds)), f"site-{rng.integers(2)}"
        events.append(Event(start, "hang", other))
        events.append(Event(start + float(rng.uniform(5, 40)), "go_on", other))
    elif extra == 3:
        names = (*names, "site-2")
        oddity = ODDITIES[(seed // 4) % len(ODDITIES)]
        if oddity == "joins_late":
            events.append(Event(float(rng.uniform(20, seconds)), "join", "site-2"))
        else:
            oddities["site-2"] = oddity
        if oddity == "full_disk":
            events.append(Event(float(rng.uniform(seconds / 2, seconds)), "room", "site-2"))
    return Scenario(seed, tuple(sorted(events)), oddities, names)
