"""What a run folder says, as records: a number not measured is None, one that blew up is NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "BESIDE",
    "METRICS",
    "QUALITIES",
    "ROLES",
    "STATUSES",
    "UNITS",
    "AdapterFacts",
    "Attack",
    "AttackPoint",
    "Audit",
    "AuditedEmulator",
    "Cost",
    "EmulatorFacts",
    "Habit",
    "Learning",
    "Participation",
    "Quality",
    "RoundRecord",
    "RunData",
    "Spent",
    "Summary",
    "Trained",
    "Worth",
]

METRICS: Final = ("perplexity", "accuracy")
BESIDE: Final = {"perplexity": "bits_per_byte", "accuracy": "cross_entropy"}
"""What is told beside each metric."""
UNITS: Final = {"perplexity": "tokens", "accuracy": "examples"}
"""What ``num_tokens`` counts in runs of each metric."""
QUALITIES: Final = (
    "full_zero_shot",
    "emulator_zero_shot",
    "emulator_tuned",
    "plug_in",
    "full_tuned",
)
ROLES: Final = ("device", "server")
STATUSES: Final = ("accepted", "rejected", "dropped", "late", "failed")

Spent = tuple[float | None, float | None, float | None]
"""Seconds, joules and bytes."""


@dataclass(frozen=True)
class Participation:
    """What one participant did in one round."""

    client_id: str
    role: str
    """One of ROLES."""
    status: str
    """One of STATUSES."""
    reason: str = ""
    num_examples: float | None = None
    weight: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    num_tokens: float | None = None
    seconds: float | None = None
    bytes_down: float | None = None
    bytes_up: float | None = None
    rung: str = ""
    """The emulator that it tuned on."""
    bytes_emulator: float | None = None
    """The part of bytes_down that brought it that emulator."""

    @property
    def key(self) -> tuple[str, str]:
        """Role and name: a device may bear the name of the server."""
        return (self.role, self.client_id)


@dataclass(frozen=True)
class RoundRecord:
    """One line of metrics.jsonl; round 0 is the state before any tuning."""

    server_round: int
    is_evaluated: bool = False
    plug_in: float | None = None
    plug_in_beside: float | None = None
    """What BESIDE names for the run's metric."""
    train_loss: float | None = None
    update_norm: float | None = None
    product_error: float | None = None
    participants: tuple[Participation, ...] = ()
    bytes_down: float | None = None
    bytes_up: float | None = None
    num_tokens: float | None = None
    seconds: float | None = None
    elapsed_seconds: float | None = None
    peak_rss_bytes: float | None = None
    simulated: Spent = (None, None, None)
    """In the simulated world; all None if there is none."""
    set_aside: tuple[str, ...] = ()
    """Devices that take part no more."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quality:
    """The five qualities of a finished run, each under its name in QUALITIES."""

    metric: str
    """One of METRICS."""
    values: Mapping[str, float | None]
    beside: Mapping[str, float | None] = field(default_factory=dict)
    """What BESIDE names for the metric, of each quality."""
    gap_closed: float | None = None

    @property
    def plug_in(self) -> float | None:
        """The full model with the tuned adapter."""
        return self.values.get("plug_in")

    @property
    def full_zero_shot(self) -> float | None:
        """The full model untouched."""
        return self.values.get("full_zero_shot")


@dataclass(frozen=True)
class EmulatorFacts:
    """The stand-in that devices held."""

    recipe: str
    num_parameters: float | None
    num_bytes: float | None
    fidelity: Mapping[str, float | None] = field(default_factory=dict)
    """What was measured of it beside the full model, by name."""


@dataclass(frozen=True)
class AdapterFacts:
    """The part that was tuned."""

    peft: str
    num_parameters: float | None
    num_bytes: float | None


@dataclass(frozen=True)
class Cost:
    """What the run used."""

    bytes_down: float | None = None
    bytes_up: float | None = None
    wall_seconds: float | None = None
    peak_rss_bytes: float | None = None
    tokens_per_second: float | None = None
    simulated_seconds: float | None = None
    simulated_joules: float | None = None
    simulated_bytes: float | None = None


@dataclass(frozen=True)
class Promise:
    """What noise promises to one kind of unit."""

    unit: str
    epsilon: float | None
    noise_multiplier: float | None
    """None where each device has the noise for its own number of examples."""
    clip_norm: float | None
    sample_rate: float | None = None
    """Chance of a device to be in a round; 1 where it is not drawn. None for examples."""


@dataclass(frozen=True)
class PrivacyFacts:
    """What the run hid."""

    delta: float | None
    is_secret: bool
    """Whether nobody else can draw the noise again."""
    promises: tuple[Promise, ...]


@dataclass(frozen=True)
class Summary:
    """summary.json, written when a run ends."""

    method: str
    model: str
    quality: Quality
    num_parameters: float | None = None
    seed: float | None = None
    num_rounds: float | None = None
    num_clients: float | None = None
    best_round: float | None = None
    """The round whose adapter, best on the validation split, gave the result."""
    emulator: EmulatorFacts | None = None
    adapter: AdapterFacts | None = None
    privacy: PrivacyFacts | None = None
    cost: Cost = field(default_factory=Cost)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackPoint:
    """What an attack had reached after some tokens."""

    num_tokens: float
    value: float | None


@dataclass(frozen=True)
class Attack:
    """One way to get the full model's ability back."""

    name: str
    learning_rate: float | None
    recovered_ratio: float | None
    regained_ratio: float | None
    curve: tuple[AttackPoint, ...]


@dataclass(frozen=True)
class AuditedEmulator:
    """What one emulator gives away."""

    name: str
    recipe: str
    equal_ratio: float | None
    near_ratio: float | None
    leaked_ratio: float | None
    recovered_ratio: float | None
    full: float | None
    untouched: float | None
    attacks: tuple[Attack, ...]
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """audit.json."""

    metric: str
    public_text: str
    held_out: str
    emulators: tuple[AuditedEmulator, ...]


@dataclass(frozen=True)
class MembershipAttack:
    """How well one attack tells the examples in an update from others."""

    name: str
    auc: float | None
    low: float | None
    high: float | None
    tpr: float | None
    """Share of the members found at 1 % of false alarms."""


@dataclass(frozen=True)
class Membership:
    """Attacks on one kind of update behind one defence."""

    training: str
    defence: str
    epsilon: float | None
    num_members: float | None
    num_others: float | None
    attacks: tuple[MembershipAttack, ...]


@dataclass(frozen=True)
class Inverted:
    """Texts read back from one kind of update behind one defence."""

    training: str
    defence: str
    epsilon: float | None
    num_texts: float | None
    rouge_1: float | None
    rouge_l: float | None
    baseline_rouge_1: float | None
    baseline_rouge_l: float | None


@dataclass(frozen=True)
class PrivacyAudit:
    """privacy_audit.json."""

    num_devices: float | None
    membership: tuple[Membership, ...]
    inversion: tuple[Inverted, ...]


@dataclass(frozen=True)
class Learning:
    """One policy's returns while it was trained."""

    steps: tuple[float, ...]
    """Simulated rounds by then."""
    returns: tuple[float | None, ...]


@dataclass(frozen=True)
class Worth:
    """The mean return of a kind of controller in worlds that none was trained in."""

    kind: str
    mean: float
    half_width: float | None
    """Of its 95 % interval."""
    seconds: float | None
    """What it took to tune or train it."""


@dataclass(frozen=True)
class Habit:
    """How likely a policy chooses what, by one trait of a device; one number per center."""

    trait: str
    centers: tuple[float | None, ...]
    takes_part: tuple[float | None, ...]
    choices: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    """By ``rung`` and ``local_steps``, of a device that takes part: each of them by its name."""


@dataclass(frozen=True)
class Trained:
    """controller.json."""

    curves: tuple[Learning, ...] = ()
    worths: tuple[Worth, ...] = ()
    habits: tuple[Habit, ...] = ()
    fault: str = ""
    """Why there is nothing to show, if the file is damaged."""


@dataclass(frozen=True)
class RunData:
    """A run folder."""

    name: str
    metric: str = "perplexity"
    """One of METRICS."""
    config_text: str | None = None
    rounds: tuple[RoundRecord, ...] = ()
    """By server_round, each once; round 0 first if there is one."""
    summary: Summary | None = None
    reference: RunData | None = None
    """The run of the upper bound, ``full_tuned``, if this run has one."""
    audit: Audit | None = None
    """What the emulator gives away, if it was audited."""
    privacy_audit: PrivacyAudit | None = None
    """What updates give away, if that was audited."""
    trained: Trained | None = None
    """What the run was steered by, if that was trained."""
    notes: tuple[str, ...] = ()
    """What a reader must know about the files, one sentence each."""

    @property
    def last_round(self) -> int:
        """The last round recorded, 0 before the first."""
        return self.rounds[-1].server_round if self.rounds else 0

    @property
    def tuning_rounds(self) -> tuple[RoundRecord, ...]:
        """The rounds without round 0."""
        return tuple(record for record in self.rounds if record.server_round > 0)

    @property
    def before_tuning(self) -> float | None:
        """Validation quality at round 0."""
        return self.rounds[0].plug_in if self.rounds and self.rounds[0].server_round == 0 else None
