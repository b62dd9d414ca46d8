"""Where a run stands, as records: its rounds so far, its participants, and what went wrong."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from fedpeat.report.fields import finite
from fedpeat.report.headline import latest_plug_in
from fedpeat.report.overview import cost_of
from fedpeat.report.records import Participation, RoundRecord, RunData

__all__ = ["Event", "Life", "ParticipantStanding", "Stage", "Standing", "Tally"]

Life = Literal["running", "finished", "stopped", "unknown"]

_REPLIED: Final = frozenset({"accepted", "rejected"})
"""Statuses of those whose update reached the server."""
_MOST_RECENT = 30
_MOST_EVENTS = 200
_MOST_NAMED = 5
_SITS_OUT = " sits out: "
"""What the round loop says of a device that did not answer properly before the round."""


@dataclass(frozen=True)
class ParticipantStanding:
    """One participant, from all rounds so far."""

    client_id: str
    role: str
    status: str
    """In the last round that it was drawn in, as are ``reason`` and ``rung``."""
    reason: str
    rung: str
    server_round: int
    """The last round that it was drawn in."""
    last_seen_round: int | None = None
    """The last round in which its update came in, counted or not."""
    num_examples: float | None = None
    last_loss: float | None = None
    bytes_down: float = 0.0
    bytes_up: float = 0.0
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Number of rounds of each status."""
    recent: tuple[tuple[int, str], ...] = ()
    """Round and status of the last rounds that it was drawn in."""

    @property
    def num_drawn(self) -> int:
        """Rounds that it was drawn in."""
        return sum(self.statuses.values())


@dataclass(frozen=True)
class Event:
    """Something in a round that an operator should know."""

    server_round: int
    kind: Literal["warning", "fault"]
    """What the round loop warned of, or updates that did not count."""
    text: str


@dataclass(frozen=True)
class Stage:
    """A run inside the run: the upper bound, or a device alone."""

    name: str
    life: Life
    last_round: int


@dataclass(frozen=True)
class Standing:
    """What a run folder says at one moment.

    Attributes:
        run: Rounds without their participants, and the summary if there is one.
        life: Whether a process works on the run; known from the lock of the folder.
        num_rounds: Rounds that the settings ask for.
        method: As the settings say.
        model: As the settings say.
        participants: By role and name; the server first.
        accepted: Number accepted and number drawn, by round.
        events: The newest first, the oldest left out where there are many.
        num_warnings: All warnings so far.
        sits_out: What is said of those who sat out the last round.
        set_aside: Devices that take part no more, as too many of their updates were rejected.
        changed_seconds: When the rounds were last written [s since 1970].
        stages: Runs inside the run.
        last_log: The last line of log.txt, which tells what goes on before the first round.
    """

    run: RunData
    life: Life
    num_rounds: int | None = None
    method: str = ""
    model: str = ""
    participants: tuple[ParticipantStanding, ...] = ()
    accepted: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    num_warnings: int = 0
    sits_out: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()
    changed_seconds: float | None = None
    stages: tuple[Stage, ...] = ()
    last_log: str = ""

    @property
    def remaining_seconds(self) -> float | None:
        """The rounds left times the mean of the last five [s]; None where that is not known."""
        recent = [r.seconds for r in self.run.tuning_rounds[-5:] if r.seconds is not None]
        if self.life != "running" or self.num_rounds is None or not recent:
            return None
        return max(self.num_rounds - self.run.last_round, 0) * sum(recent) / len(recent)

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON data, numbers that are not finite as None."""
        cost, rounds = cost_of(self.run), self.run.rounds
        last = rounds[-1] if rounds else None
        told: dict[str, Any] = finite(
            {
                "schema": 1,
                "name": self.run.name,
                "state": self.life,
                "method": self.method,
                "model": self.model,
                "server_round": self.run.last_round if last else None,
                "num_rounds": self.num_rounds,
                "metric": self.run.metric,
                "plug_in": latest_plug_in(self.run),
                "train_loss": last.train_loss if last else None,
                "bytes_down": cost.bytes_down,
                "bytes_up": cost.bytes_up,
                "elapsed_seconds": last.elapsed_seconds if last else None,
                "remaining_seconds": self.remaining_seconds,
                "changed_seconds": self.changed_seconds,
                "participants": [_participant_record(item) for item in self.participants],
                "rounds": [_round_record(item, self.accepted) for item in rounds],
                "events": [vars(event) for event in self.events],
                "sits_out": list(self.sits_out),
                "set_aside": list(self.set_aside),
                "stages": [vars(stage) for stage in self.stages],
                "last_log": self.last_log,
                "notes": list(self.run.notes),
            }
        )
        return told


def _participant_record(item: ParticipantStanding) -> dict[str, Any]:
    left_out = {"recent", "statuses"}
    plain = {name: value for name, value in vars(item).items() if name not in left_out}
    return {**plain, "statuses": dict(item.statuses)}


def _round_record(
    record: RoundRecord, accepted: Mapping[int, tuple[int, int]]
) -> dict[str, float | None]:
    num_accepted, num_drawn = accepted.get(record.server_round, (0, 0))
    names = ("plug_in", "train_loss", "bytes_down", "bytes_up", "seconds", "elapsed_seconds")
    return {
        "server_round": record.server_round,
        **{name: getattr(record, name) for name in names},
        "num_accepted": num_accepted,
        "num_drawn": num_drawn,
    }


class Tally:
    """Adds rounds up as they come, so that a long run is not read again after each.

    What it keeps grows with the rounds and with the participants, not with their product.
    """

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []
        self.participants: dict[tuple[str, str], ParticipantStanding] = {}
        self.accepted: dict[int, tuple[int, int]] = {}
        self.events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self.num_warnings = 0
        self.sits_out: tuple[str, ...] = ()
        self.metric: str | None = None

    @property
    def last_round(self) -> int:
        """The last round added, -1 before the first."""
        return self.rounds[-1].server_round if self.rounds else -1

    def add(self, record: RoundRecord, metric: str | None) -> None:
        """Add the round that comes next."""
        assert record.server_round > self.last_round, "rounds are added in order"
        self.metric = metric or self.metric
        self.rounds.append(replace(record, participants=()))
        num_accepted = sum(item.status == "accepted" for item in record.participants)
        self.accepted[record.server_round] = (num_accepted, len(record.participants))
        for item in record.participants:
            old = self.participants.get(item.key)
            self.participants[item.key] = _further(old, item, record.server_round)
        self.events.extend(_faults(record))
        self.events.extend(Event(record.server_round, "warning", text) for text in record.warnings)
        self.num_warnings += len(record.warnings)
        self.sits_out = tuple(text for text in record.warnings if _SITS_OUT in text)


def _further(
    old: ParticipantStanding | None, item: Participation, server_round: int
) -> ParticipantStanding:
    """Return where a participant stands after one more round."""
    old = old or ParticipantStanding(item.client_id, item.role, item.status, "", "", server_round)
    statuses = Counter(old.statuses) + Counter([item.status])
    return ParticipantStanding(
        client_id=item.client_id,
        role=item.role,
        status=item.status,
        reason=item.reason,
        rung=item.rung,
        server_round=server_round,
        last_seen_round=server_round if item.status in _REPLIED else old.last_seen_round,
        num_examples=old.num_examples if item.num_examples is None else item.num_examples,
        last_loss=old.last_loss if item.last_loss is None else item.last_loss,
        bytes_down=old.bytes_down + (item.bytes_down or 0.0),
        bytes_up=old.bytes_up + (item.bytes_up or 0.0),
        statuses=dict(statuses),
        recent=(*old.recent, (server_round, item.status))[-_MOST_RECENT:],
    )


def _faults(record: RoundRecord) -> list[Event]:
    """Return the updates of a round that did not count, one event for each status and reason."""
    lost: dict[tuple[str, str], list[str]] = {}
    for item in record.participants:
        if item.status != "accepted":
            lost.setdefault((item.status, item.reason), []).append(item.client_id)
    return [
        Event(record.server_round, "fault", f"{_names(names)} {status}{reason and ': '}{reason}")
        for (status, reason), names in lost.items()
    ]


def _names(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
