"""Where a run stands, for Prometheus to scrape.

Source:
    Prometheus, "Exposition formats", text format version 0.0.4: HELP and TYPE before the samples of
    a family; backslash, double quote and line feed escaped in label values; one sample per set of
    labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from fedpeat.report.headline import latest_plug_in
from fedpeat.report.markup import clean
from fedpeat.report.records import STATUSES, RoundRecord
from fedpeat.report.standing import Life, ParticipantStanding, Standing

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_MOST_PARTICIPANTS: Final = 1000
"""So many have series of their own; a federation of millions must not fill a time-series store."""

Sample = tuple[Mapping[str, str], float | None]


@dataclass(frozen=True)
class _Family:
    name: str
    kind: Literal["gauge", "counter"]
    meaning: str
    samples: Sequence[Sample]


def exposition(standing: Standing) -> str:
    """Return all metrics as text; a number that is not known has no sample."""
    families = (*_run(standing), *_quality(standing), *_sums(standing), *_participants(standing))
    return "".join(line + "\n" for family in families for line in _lines(family))


def _run(standing: Standing) -> Iterator[_Family]:
    info = {
        "name": standing.run.name,
        "method": standing.method,
        "model": standing.model,
        "metric": standing.run.metric,
    }
    states = [({"state": life}, float(standing.life == life)) for life in get_args(Life)]
    yield _Family("fedpeat_run_info", "gauge", "What runs; always 1.", [(info, 1.0)])
    yield _Family("fedpeat_run_state", "gauge", "1 for the state that the run is in.", states)
    yield _gauge("fedpeat_run_rounds", "Rounds that the settings ask for.", standing.num_rounds)
    rounds = standing.run.rounds
    last_round = standing.run.last_round if rounds else None
    yield _gauge("fedpeat_run_last_round", "The last finished round.", last_round)
    yield _gauge(
        "fedpeat_run_changed_timestamp_seconds",
        "When a round was last written, in seconds since 1970.",
        standing.changed_seconds,
    )


def _quality(standing: Standing) -> Iterator[_Family]:
    rounds, metric = standing.run.rounds, {"metric": standing.run.metric}
    plug_in = [(metric, latest_plug_in(standing.run))] if rounds else []
    yield _Family("fedpeat_plug_in", "gauge", "Last known quality of the plug-in.", plug_in)
    last = rounds[-1] if rounds else RoundRecord(0)
    for name, meaning, value in (
        ("train_loss", "Mean loss of the accepted updates [nat].", last.train_loss),
        ("update_norm", "How far the last round moved the adapter.", last.update_norm),
        ("round_seconds", "What the last round took.", last.seconds),
        ("peak_rss_bytes", "Most memory that the run has held.", last.peak_rss_bytes),
    ):
        yield _gauge(f"fedpeat_{name}", meaning, value)


def _sums(standing: Standing) -> Iterator[_Family]:
    rounds = standing.run.rounds
    traffic: list[Sample] = [
        ({"direction": "down"}, sum(record.bytes_down or 0.0 for record in rounds)),
        ({"direction": "up"}, sum(record.bytes_up or 0.0 for record in rounds)),
    ]
    updates: list[Sample] = [
        ({"status": name}, float(sum(p.statuses.get(name, 0) for p in standing.participants)))
        for name in STATUSES
    ]
    num_tokens = sum(record.num_tokens or 0.0 for record in rounds)
    for name, meaning, samples in (
        ("bytes", "Length of all messages to and from devices.", traffic),
        ("updates", "Participants drawn, by what came of it.", updates),
        ("tokens", "Tokens, or images, that participants trained on.", [({}, num_tokens)]),
        ("warnings", "Warnings of the round loop.", [({}, float(standing.num_warnings))]),
    ):
        yield _Family(f"fedpeat_{name}_total", "counter", meaning, samples)
    num_participants = float(len(standing.participants))
    yield _gauge("fedpeat_participants", "Participants ever drawn.", num_participants)
    sits_out = float(len(standing.sits_out))
    yield _gauge("fedpeat_sits_out", "Devices that sat out the last round.", sits_out)
    set_aside = float(len(standing.set_aside))
    yield _gauge("fedpeat_set_aside", "Devices that take part no more.", set_aside)


def _participants(standing: Standing) -> Iterator[_Family]:
    shown = standing.participants[:_MOST_PARTICIPANTS]
    labels = [{"client_id": item.client_id, "role": item.role} for item in shown]
    yield _Family(
        "fedpeat_participant_last_seen_round",
        "gauge",
        f"The last round in which its update came in (of the first {_MOST_PARTICIPANTS}).",
        [(label, item.last_seen_round) for label, item in zip(labels, shown, strict=True)],
    )
    yield _Family(
        "fedpeat_participant_bytes_total",
        "counter",
        "Length of its messages.",
        [
            ({**label, "direction": direction}, value)
            for label, item in zip(labels, shown, strict=True)
            for direction, value in (("down", item.bytes_down), ("up", item.bytes_up))
        ],
    )
    yield _Family(
        "fedpeat_participant_updates_total",
        "counter",
        "Rounds that it was drawn in, by what came of it.",
        [
            ({**label, "status": status}, float(count))
            for label, item in zip(labels, shown, strict=True)
            for status, count in _sorted_counts(item)
        ],
    )


def _sorted_counts(item: ParticipantStanding) -> Iterable[tuple[str, int]]:
    return sorted(item.statuses.items())


def _gauge(name: str, meaning: str, value: float | None) -> _Family:
    return _Family(name, "gauge", meaning, [({}, value)])


def _lines(family: _Family) -> Iterator[str]:
    """Yield a family; where names become the same once they are cleaned, the first counts."""
    samples = {_labels(labels): value for labels, value in reversed(family.samples)}
    known = {labels: value for labels, value in samples.items() if value is not None}
    if not known:
        return
    yield f"# HELP {family.name} {family.meaning}"
    yield f"# TYPE {family.name} {family.kind}"
    yield from (f"{family.name}{labels} {_number(known[labels])}" for labels in reversed(known))


def _labels(labels: Mapping[str, str]) -> str:
    pairs = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(text: str) -> str:
    """Return a label's value; bytes that could break or hide a line are made visible."""
    text = clean(text)
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
