"""Records between the parts of a federation, and two protocols for parts that can be swapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

__all__ = [
    "ClientPlan",
    "ClientState",
    "Controller",
    "ParticipantResult",
    "Reply",
    "RoundObservation",
    "RoundPlan",
    "RoundResult",
    "Status",
    "Transport",
]

Status = Literal["accepted", "rejected", "dropped", "late", "failed"]


@dataclass(frozen=True)
class Reply:
    """What came back for one task: the bytes of a payload, or the reason why there is none.

    Attributes:
        node: Who was asked.
        content: Encoded payload, or None.
        error: Why there is no payload.
        lost: Whether the node went away, rather than failed at the task.
    """

    node: str
    content: bytes | None = None
    error: str = ""
    lost: bool = False


@runtime_checkable
class Transport(Protocol):
    """How tasks reach participants; the round loop knows nothing else of them.

    Attributes:
        interval_seconds: How long to wait before asking again after a ``poll`` that brought
            nothing [s].
    """

    interval_seconds: float

    def nodes(self) -> list[str]:
        """Return the ids of the participants that can be reached now."""

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Send one task to each node and return at once.

        Args:
            kind: What is asked, e.g. "train".
            tasks: Encoded payload for each node.
            deadline_seconds: Time after which no reply is wanted [s]; None for no limit.

        Returns:
            The node of each ticket; a ticket names the task in ``poll``.
        """

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Return the replies that have come for these tickets since the last call, perhaps none."""


@dataclass(frozen=True)
class ClientState:
    """What the server knows of a device when it plans a round.

    Attributes:
        client_id: Its name.
        num_examples: Examples that it has, as it says.
        held_rungs: Emulators that it holds.
        held_parts: Beginnings of the hashes of the emulators' parts that it need not be sent.
        last_loss: Mean loss of its last accepted update.
        kept_part: Hash of the part of the round's adapter that it need not be sent; empty for none.
    """

    client_id: str
    num_examples: int
    held_rungs: tuple[str, ...] = ()
    held_parts: frozenset[str] = frozenset()
    last_loss: float | None = None
    kept_part: str = ""


@dataclass(frozen=True)
class RoundObservation:
    """What a controller sees before a round.

    ``loss`` is the last known loss of the plugged-in model on held-out data [nat per token, or per
    image].
    """

    server_round: int
    num_rounds: int
    clients: tuple[ClientState, ...]
    loss: float | None = None


@dataclass(frozen=True)
class ClientPlan:
    """What one device is asked to do in a round.

    ``lost`` says why its update will not come back, where a simulated world decides that; it is
    empty for everyone else.
    """

    client_id: str
    rung: str
    local_steps: int
    lost: str = ""


@dataclass(frozen=True)
class RoundPlan:
    """Who takes part in a round, with what, and how much the server does.

    ``realigns`` asks for the emulators to be aligned anew first; ``simulated`` is what the round
    costs in a simulated world: seconds, joules and bytes.
    """

    cohort: tuple[ClientPlan, ...]
    server_steps: int
    realigns: bool = False
    simulated: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Controller(Protocol):
    """Decides each round; its state is part of the checkpoint."""

    def plan(self, observation: RoundObservation) -> RoundPlan:
        """Return the plan of the coming round."""

    def state(self) -> Mapping[str, Any]:
        """Return all that a resumed controller needs, as plain JSON data."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that ``state`` returned."""


@dataclass(frozen=True)
class ParticipantResult:
    """What one participant did in a round, as it goes into metrics.jsonl.

    ``rung`` is the emulator that it tuned on, empty for the server; ``bytes_emulator``, the part of
    ``bytes_down`` that brought it what it lacked of that emulator. ``clip_ratio`` is what its
    update was scaled by to stay within the round's bound; None where there is none. ``epsilon`` is
    what the device's examples have been promised so far; None where nothing is. ``bytes_up_plain``
    is what ``bytes_up`` would have been with updates in plain float32; of an update that is not
    accepted nobody can tell, and it counts as it came. Secure aggregation hides examples, tokens
    and weight of a device, which are 0 then, and its losses.
    """

    client_id: str
    role: Literal["device", "server"]
    status: Status
    reason: str = ""
    num_examples: int = 0
    weight: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    num_tokens: int = 0
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    rung: str = ""
    bytes_emulator: int = 0
    clip_ratio: float | None = None
    bytes_up_plain: int = 0
    epsilon: float | None = None


@dataclass(frozen=True)
class RoundResult:
    """One line of metrics.jsonl.

    ``product_error`` is ||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| over all pairs of LoRA: what
    averaging A and B apart does wrong, or, with "svd", would have done; None without LoRA.
    ``refresh_bytes`` is, by rung, the length of the parts of the emulator that were aligned anew
    before the round; empty where none was. ``simulated`` is what the round cost in a simulated
    world, as in its plan. ``set_aside`` names all devices that take part no more. ``privacy`` is
    what was spent by the end of the round: the largest ``example_epsilon`` of a device, the
    ``client_epsilon`` and the ``client_sample_rate`` that it counts with (1: chosen in a way that
    hides nothing), and ``delta``; empty where nothing is hidden. ``bytes_up_plain`` is as of the
    participants.
    """

    server_round: int
    quality: Mapping[str, Any] | None = None
    train_loss: float | None = None
    update_norm: float = 0.0
    product_error: float | None = None
    participants: tuple[ParticipantResult, ...] = ()
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_up_plain: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    elapsed_seconds: float = 0.0
    peak_rss_bytes: int = 0
    refresh_bytes: Mapping[str, int] = field(default_factory=dict)
    simulated: Mapping[str, float] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()
    privacy: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = field(default_factory=tuple)
