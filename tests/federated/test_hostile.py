"""Ten thousand hostile messages at the server's checks: none is believed, none does harm."""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fakes import (
    RUNG,
    FakeClock,
    FakeDevice,
    FakeTransport,
    Script,
    adapter,
    federation,
    saying,
    start,
    update_of,
)
from fedpeat.core.errors import WireError
from fedpeat.core.records import Reply
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated import exchange
from fedpeat.federated.admission import judge
from fedpeat.federated.codecs import UpdateCodec, UpdateEncoder
from fedpeat.federated.reception import Reception
from fedpeat.federated.screening import MAX_ANSWER_BYTES, Limits, longest_update
from hostile import CRAFTED, hostile, is_proper_update, raw

CODECS = ("float32", "bf16", "int8", "topk")
UPDATES, ANSWERS = 1900, 500  # of each codec; of each kind of message in a round
EXPECTED = {"server_round": 1, "emulator": RUNG.sha256}
MAX_NORM, MAX_EXAMPLES = 100.0, 1000
MIB = 2**20
MOST_FETCHED = 8 * len(RUNG.parts["f" * 64])

# tests/federated/test_hostile_devices.py has the device's side
assert len(CODECS) * UPDATES + 5 * ANSWERS >= 10_000


def honest_update(codec: UpdateCodec, value: float = 0.25) -> bytes:
    given = adapter()
    reply = update_of(Payload(given, EXPECTED), value)
    new = {name: array + np.float32(i) for i, (name, array) in enumerate(reply.arrays.items())}
    arrays = UpdateEncoder().encode(new, given, codec, key="", part="all", server_round=1)
    return encode(Payload(arrays, reply.record))


@pytest.mark.parametrize("codec_name", CODECS)
def test_of_hostile_updates_those_alone_are_accepted_that_an_honest_device_may_send(
    codec_name: str,
) -> None:
    codec = UpdateCodec(codec_name, 0.3)
    others = [honest_update(UpdateCodec(name, 0.3), 0.5) for name in CODECS]
    limits, before = Limits(MAX_EXAMPLES, MAX_NORM), peak_rss_bytes()
    verdicts: dict[tuple[bool, bool], int] = {}
    for content in hostile(honest_update(codec), others, CODECS.index(codec_name), UPDATES):
        outcome = judge("a", Reply("a", content), adapter(), EXPECTED, limits, codec)
        proper = is_proper_update(
            content,
            adapter(),
            EXPECTED,
            codec=codec_name,
            kept=3,
            max_examples=MAX_EXAMPLES,
            max_norm=MAX_NORM,
        )
        verdicts[outcome.accepted, proper] = verdicts.get((outcome.accepted, proper), 0) + 1
        assert outcome.accepted or outcome.result.status == "rejected"
        assert not outcome.accepted or proper, content
        assert outcome.accepted or 0 < len(outcome.result.reason) <= 300
        assert outcome.result.reason.isprintable()
    grown = peak_rss_bytes() - before
    told = f"{codec_name} (accepted, proper): {verdicts}; memory grew by {grown / MIB:.1f} MiB"
    print(told)  # noqa: T201 - the figures, for those who want to see them
    assert sum(verdicts.values()) == UPDATES
    assert verdicts[False, False] > 0.75 * UPDATES
    assert verdicts[True, True] > 0.01 * UPDATES  # changes that are harmless are told from others
    assert verdicts.get((False, True), 0) == 0
    assert grown < 64 * MIB


def test_honest_updates_are_accepted_in_every_codec() -> None:
    for name in CODECS:
        codec = UpdateCodec(name, 0.3)
        reply = Reply("a", honest_update(codec))
        outcome = judge("a", reply, adapter(), EXPECTED, Limits(MAX_EXAMPLES, MAX_NORM), codec)
        assert outcome.accepted, outcome.result.reason


# --- whole rounds -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(exchange, "time", clock)
    return clock


class Equipped(FakeDevice):
    """Trains whatever it was asked to hold; whether it may be asked is tested elsewhere."""

    def answer(self, kind: str, content: bytes) -> bytes:
        if kind == "train":
            self.held.add(RUNG.sha256)
        return super().answer(kind, content)


class FleetDevice(Equipped):
    """Answers like the worker of a real device; it has been welcomed."""

    def answer(self, kind: str, content: bytes) -> bytes:
        if kind == "welcome":
            return encode(Payload(record={"welcome": "w"}))
        answer = decode(super().answer(kind, content))
        if kind == "hold":
            return encode(Payload(record={**answer.record, "fetched_bytes": 9}))
        own = {**decode(super().answer("hello", b"")).record, "welcome": "w"}
        more = own if kind == "hello" else {"inventory": own}
        return encode(Payload(answer.arrays, {**answer.record, **more}))


HONEST = {"a": 1.0, "b": 2.0}


def round_with(kind: str, *, seed: int, on_a_fleet: bool = False, is_known: bool = False) -> None:
    """Run rounds with two honest devices and many that answer one kind with hostile messages.

    Whatever they say must change neither the average of the honest ones nor the run.
    """
    make = FleetDevice if on_a_fleet else Equipped
    names = [f"hostile-{i:03}" for i in range(ANSWERS)]
    devices = {name: make(delta, 10) for name, delta in HONEST.items()}
    devices |= {name: make(7.0, 10, held={RUNG.sha256} if is_known else set()) for name in names}
    honest = answer_of(make, kind)
    scripts: dict[tuple[str, str], Script] = {
        (kind, name): saying(content)
        for name, content in zip(
            names, hostile(honest, [honest, encode(Payload())], seed, ANSWERS), strict=True
        )
    }
    reception = Reception("w", encode(Payload()), lambda parts: {s: {} for s in parts})
    transport = FakeTransport(devices, scripts)
    loop = federation(
        transport,
        limits=Limits(MAX_EXAMPLES, 10.0),  # what adds 7 to all is too far off
        deadline_seconds=0.05,
        reception=reception if on_a_fleet else None,
    )
    state, expected = start(), 0.0
    for server_round in (1, 2) if on_a_fleet else (1,):
        state, result = loop.run_round(state, None)
        accepted = {p.client_id for p in result.participants if p.status == "accepted"}
        assert accepted.issuperset(HONEST)
        for name in accepted - set(HONEST):
            assert kind == "train", (name, scripts[kind, name](b""))
        if accepted == set(HONEST):
            expected += 1.5
            np.testing.assert_allclose(state.adapter["lora_A"], expected, rtol=1e-6)
        assert all(np.isfinite(array).all() for array in state.adapter.values())
        texts = [*result.warnings, *(p.reason for p in result.participants)]
        assert all(text.isprintable() and len(text) < 400 for text in texts)
        assert result.bytes_down < 100 * MIB
        assert state.server_round == server_round


def answer_of(make: type[FakeDevice], kind: str) -> bytes:
    """Return what an honest device answers in the first round."""
    device = make(7.0, 10, held={RUNG.sha256})
    if kind == "hold":
        return device.answer("hold", RUNG.hold_message(RUNG.parts, []))
    task = encode(Payload(adapter(), EXPECTED))
    return device.answer(kind, task)


@pytest.mark.parametrize("kind", ["hello", "hold", "train"])
def test_hostile_answers_change_no_round(kind: str) -> None:
    round_with(kind, seed=10, is_known=kind == "train")


@pytest.mark.parametrize("kind", ["hello", "hold"])
def test_hostile_answers_change_no_round_of_a_fleet(kind: str) -> None:
    round_with(kind, seed=11, on_a_fleet=True)


# --- single attacks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_message_is_refused_or_empty_within_memory(name: str) -> None:
    content = CRAFTED[name]
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        outcome = judge("a", Reply("a", content), adapter(), EXPECTED, Limits(MAX_EXAMPLES))
        peak = tracemalloc.get_traced_memory()[1] - base
    finally:
        tracemalloc.stop()
    assert outcome.result.status == "rejected"
    assert peak < 40 * MIB, peak


def test_an_update_longer_than_an_honest_one_could_be_is_not_even_read() -> None:
    longest = longest_update(adapter())
    content = raw(b"[" + b"{}," * (longest // 3 + 1))
    tracemalloc.start()
    try:
        outcome = judge("a", Reply("a", content), adapter(), EXPECTED, Limits(MAX_EXAMPLES))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"at most {longest} bytes here" in outcome.result.reason
    assert peak < MIB / 4


def test_an_honest_update_with_the_longest_inventory_is_read() -> None:
    hashes = ["0" * 64] * 4096
    record = {**update_of(Payload({}, EXPECTED), 0).record}
    record["inventory"] = {"held": hashes, "emulator_parts": [h[:16] for h in hashes]}
    content = encode(Payload(adapter(1.0), record))
    outcome = judge("a", Reply("a", content), adapter(), EXPECTED, Limits(MAX_EXAMPLES))
    assert outcome.accepted, outcome.result.reason


@pytest.mark.parametrize(("value", "wanted"), [(True, 1), (1.0, 1), (False, 0)])
def test_what_equals_a_round_but_is_no_whole_number_is_no_round(value: object, wanted: int) -> None:
    expected = {**EXPECTED, "server_round": wanted}
    record = {**update_of(Payload({}, EXPECTED), 0).record, "server_round": value}
    reply = Reply("a", encode(Payload(adapter(), record)))
    outcome = judge("a", reply, adapter(), expected, Limits(MAX_EXAMPLES))
    assert outcome.result.reason == f"server_round must be {wanted}, got {value}"


def test_a_message_of_more_levels_than_any_honest_one_is_refused() -> None:
    def of(depth: int) -> bytes:
        return raw({"__metadata__": {"fedpeat": f'{{"schema": 1, "record": {deep(depth)}}}'}})

    def deep(depth: int) -> str:
        return '{"a":' * depth + "1" + "}" * depth

    assert decode(of(63)).record
    with pytest.raises(WireError, match="at most 64 levels deep"):
        decode(of(64))


@pytest.mark.parametrize("schema", ["true", "1.0", "2", '"1"', "null"])
def test_a_message_of_another_schema_is_refused(schema: str) -> None:
    def of(text: str) -> bytes:
        return raw({"__metadata__": {"fedpeat": f'{{"schema": {text}, "record": {{}}}}'}})

    assert decode(of("1")).record == {}
    with pytest.raises(WireError, match="message schema must be 1, got"):
        decode(of(schema))


def test_a_header_that_is_too_long_is_refused_before_it_is_read() -> None:
    content = raw(b"[" + b" " * 2**24 + b"]")
    with pytest.raises(WireError, match="header must have at most 16777216 bytes, got"):
        decode(content)


def fleet_round(changes: Mapping[str, Any], kind: str) -> Any:
    """Run a round in which one of two devices of a fleet answers something else."""
    devices: dict[str, FakeDevice] = {
        name: FleetDevice(delta, 10) for name, delta in HONEST.items()
    }
    record = {"held": RUNG.sha256, "fetched_bytes": 9} if kind == "hold" else {}
    answer = saying(Payload(record={**record, **changes}))
    reception = Reception("w", encode(Payload()), lambda parts: {s: {} for s in parts})
    transport = FakeTransport(devices, {(kind, "b"): answer})
    return federation(transport, reception=reception).run_round(start(), None)[1]


@pytest.mark.parametrize("fetched", [-1, True, 1.0, "9", 2**70, MOST_FETCHED + 1, None])
def test_bytes_that_nobody_can_have_fetched_are_not_counted(fetched: object) -> None:
    sent = {
        p.client_id: p.bytes_emulator
        for p in fleet_round({"fetched_bytes": fetched}, "hold").participants
    }
    assert sent["a"] - sent["b"] == 9
    counted = fleet_round({"fetched_bytes": MOST_FETCHED}, "hold").participants
    assert counted[1].bytes_emulator - sent["b"] == MOST_FETCHED


@pytest.mark.parametrize("held", ["e" * 63, None, ["e" * 64], 1])
def test_a_device_that_does_not_hold_what_it_was_sent_trains_nothing(held: object) -> None:
    one, other = fleet_round({"held": held}, "hold").participants
    assert (one.status, other.status) == ("accepted", "failed")
    assert other.reason.startswith(f"held must be {'e' * 12}, got")


def test_text_that_moves_the_cursor_does_not_reach_a_terminal() -> None:
    transport = FakeTransport(
        {"a": FakeDevice()},
        {("train", "b"): lambda _: Reply("b", error="\x1b[2J\ud800\nall is well")},
    )
    transport.devices["b"] = FakeDevice()
    result = federation(transport).run_round(start(), None)[1]
    assert result.participants[1].reason == "?[2J? all is well"


def test_an_answer_longer_than_any_honest_one_is_not_read() -> None:
    record = {"num_examples": 10, "held": [], "emulator_parts": [], "more": "x" * MAX_ANSWER_BYTES}
    transport = FakeTransport(
        {"a": FakeDevice(), "b": FakeDevice()}, {("hello", "b"): saying(Payload(record=record))}
    )
    result = federation(transport).run_round(start(), None)[1]
    assert result.warnings[0].startswith("'b' sits out: a message must have at most 1048576 bytes")


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
