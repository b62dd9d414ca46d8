"""From replies to outcomes: who enters the average, with which share, and why others do not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedpeat.core.errors import WireError
from fedpeat.core.records import ParticipantResult, Reply, Status
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.codecs import UpdateCodec, decode_update
from fedpeat.federated.exchange import Sent
from fedpeat.federated.screening import Limits, longest_update, one_line, screen, shown

__all__ = [
    "SERVER_ID",
    "Outcome",
    "admit",
    "answered",
    "judge",
    "refused",
    "shares",
    "with_seconds",
    "with_traffic",
]

SERVER_ID = "server"
_PLAIN = UpdateCodec()
_SECONDS = re.compile(r"[0-9]{5}\.[0-9]{6}")


@dataclass(frozen=True)
class Outcome:
    """What came of one participant's task: its line in the metrics and, if accepted, its update.

    ``start`` is what it was given of what it tuned; ``bytes_saved``, by how much its message was
    shorter than the same tensors in float32. Where secure aggregation shows a sum alone, one
    outcome stands for ``num_devices``.
    """

    result: ParticipantResult
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    mean_loss: float | None = 0.0
    start: Mapping[str, np.ndarray] = field(default_factory=dict)
    bytes_saved: int = 0
    num_devices: int = 1

    @property
    def accepted(self) -> bool:
        return self.result.status == "accepted"


def judge(
    client_id: str,
    reply: Reply | None,
    current: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    limits: Limits,
    codec: UpdateCodec = _PLAIN,
) -> Outcome:
    """Return what comes of a device's reply; None is a reply that has not come in time."""
    content = answered(client_id, reply)
    if isinstance(content, Outcome):
        return content
    try:
        sent = decode(content, longest_update(current))
        plain = Payload(decode_update(sent.arrays, current, codec), sent.record)
        outcome = admit(client_id, with_seconds(plain), current, expected, limits)
    except WireError as error:
        return refused(client_id, "rejected", str(error))
    if not outcome.accepted or plain.arrays is sent.arrays:
        return outcome
    return replace(outcome, bytes_saved=len(encode(plain)) - len(content))


def answered(client_id: str, reply: Reply | None) -> bytes | Outcome:
    """Return what a device answered; what comes of it if it did not."""
    if reply is None:
        return refused(client_id, "late", "no reply before the round closed")
    if reply.content is None:
        return refused(client_id, "dropped" if reply.lost else "failed", reply.error)
    return reply.content


def admit(
    client_id: str,
    payload: Payload,
    current: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    limits: Limits,
) -> Outcome:
    """Screen an update and return what comes of it."""
    try:
        screen(payload, current, expected, limits)
    except WireError as error:
        return refused(client_id, "rejected", str(error))
    record = payload.record
    result = ParticipantResult(
        client_id=client_id,
        role=_role(client_id),
        status="accepted",
        num_examples=record["num_examples"],
        first_loss=_loss(record, "first_loss"),
        last_loss=_loss(record, "last_loss"),
        num_tokens=record["num_tokens"],
        seconds=float(record["seconds"]),
    )
    return Outcome(result, payload.arrays, _loss(record, "mean_loss"), current)


def _loss(record: Mapping[str, Any], key: str) -> float | None:
    """Return a loss; None where examples are hidden, so that none was told."""
    loss = record.get(key)
    return None if loss is None else float(loss)


def with_traffic(outcome: Outcome, sent: Sent, rung: str) -> Outcome:
    """Return an outcome with the bytes that its participant cost, and the rung that it was on."""
    result = replace(
        outcome.result,
        bytes_down=sent.bytes_down,
        bytes_up=sent.bytes_up,
        bytes_up_plain=sent.bytes_up + outcome.bytes_saved,
        bytes_emulator=sent.bytes_emulator,
        rung=rung,
    )
    return replace(outcome, result=result)


def shares(
    updates: Sequence[Outcome], server_ratio: float | None, trust: Mapping[str, float]
) -> list[float]:
    """Return each update's share of the average.

    The server's is a fixed one, or that of its examples among all. Devices divide the rest by their
    examples, each of which counts as much as their rung is trusted.

    Args:
        updates: Accepted updates.
        server_ratio: Share of the server, if devices take part too; None to go by its examples.
        trust: What an example counts on a rung, by the rung's name; only ratios matter. On one
            that is not named it counts 1.
    """
    results = [u.result for u in updates]
    examples = sum(r.num_examples for r in results)
    own = sum(r.num_examples for r in results if r.role == "server")
    if own in {0, examples}:
        for_server = own / examples
    else:
        for_server = own / examples if server_ratio is None else server_ratio
    trusted = [r.num_examples * trust.get(r.rung, 1.0) for r in results]
    devices = sum(t for t, r in zip(trusted, results, strict=True) if r.role != "server")
    return [
        for_server if r.role == "server" else t / devices * (1 - for_server)
        for t, r in zip(trusted, results, strict=True)
    ]


def with_seconds(payload: Payload) -> Payload:
    """Turn a device's duration, text of fixed width, into a number.

    Raises:
        WireError: If it is no such text.
    """
    text = payload.record.get("seconds")
    if not isinstance(text, str) or not _SECONDS.fullmatch(text):
        raise WireError(f"seconds must be text such as '00012.345678', got {shown(text)}")
    return Payload(payload.arrays, {**payload.record, "seconds": float(text)})


def refused(client_id: str, status: Status, reason: str) -> Outcome:
    """Return the outcome of a participant whose update does not count."""
    short = one_line(reason) or "no reason given"
    return Outcome(ParticipantResult(client_id, _role(client_id), status, short))


def _role(client_id: str) -> Literal["device", "server"]:
    return "server" if client_id == SERVER_ID else "device"
