"""The round loop against devices and networks that misbehave."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from fakes import (
    RUNG,
    FakeClock,
    FakeDevice,
    FakeTransport,
    PlanOf,
    Script,
    adapter,
    everyone,
    failing,
    federation,
    saying,
    server_adding,
    silent,
    start,
    update_of,
    updating,
)
from fedpeat.core.errors import AggregationError
from fedpeat.core.records import ClientPlan, ParticipantResult, Reply, RoundPlan, RoundResult
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated import exchange
from fedpeat.federated.aggregation import ServerOptimizer
from fedpeat.federated.rounds import Federation, FederationState, is_better
from fedpeat.federated.screening import Limits
from fedpeat.federated.shelf import hashes_of


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(exchange, "time", clock)
    return clock


def three(
    scripts: Mapping[tuple[str, str], Script] | None = None, *, order: int | None = None
) -> FakeTransport:
    """Return devices a, b, c that add 1, 2, 4 and weigh 10, 20, 30."""
    devices = {"a": FakeDevice(1, 10), "b": FakeDevice(2, 20), "c": FakeDevice(4, 30)}
    return FakeTransport(devices, scripts, order=order)


HOLD = RUNG.hold_message(RUNG.parts, hashes_of([RUNG]))


def of(result: RoundResult, client_id: str) -> ParticipantResult:
    return next(r for r in result.participants if r.client_id == client_id)


def same(one: FederationState, other: FederationState) -> bool:
    return {n: a.tobytes() for n, a in one.adapter.items()} == {
        n: a.tobytes() for n, a in other.adapter.items()
    }


def value_of(state: FederationState) -> float:
    """Return the one value that all tensors hold."""
    values = {float(v) for a in state.adapter.values() for v in a.reshape(-1)}
    assert len(values) == 1
    return values.pop()


# --- a good round -------------------------------------------------------------------------------


def test_a_round_averages_by_examples() -> None:
    state, result = federation(three()).run_round(start(), None)
    assert value_of(state) == pytest.approx((10 * 1 + 20 * 2 + 30 * 4) / 60)
    assert [r.weight for r in result.participants] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert {r.status for r in result.participants} == {"accepted"}
    assert (state.server_round, result.server_round, state.num_barren_rounds) == (1, 1, 0)
    assert result.update_norm == pytest.approx(value_of(state) * math.sqrt(10))
    assert (result.train_loss, result.num_tokens, result.warnings) == (2.5, 300, ())


def test_rounds_go_on_from_each_other() -> None:
    loop = federation(three())
    state = start()
    for _ in range(3):
        state, _ = loop.run_round(state, None)
    assert value_of(state) == pytest.approx(3 * 170 / 60)
    assert state.server_round == 3


def test_controller_sees_names_examples_rungs_losses_and_quality() -> None:
    controller = PlanOf(everyone().plan)
    loop = federation(three(), controller=controller)
    state, _ = loop.run_round(start(), 12.5)
    loop.run_round(state, 11.0)
    first, second = controller.seen
    assert [(c.client_id, c.num_examples, c.held_rungs, c.last_loss) for c in first.clients] == [
        ("a", 10, (), None),
        ("b", 20, (), None),
        ("c", 30, (), None),
    ]
    assert (first.server_round, first.num_rounds, first.loss) == (1, 10, 12.5)
    assert [(c.held_rungs, c.last_loss) for c in second.clients] == [(("emulator",), 2.5)] * 3
    assert (second.server_round, second.loss) == (2, 11.0)


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
@pytest.mark.parametrize("order", range(4))
def test_results_do_not_depend_on_the_order_of_replies(rule: str, order: int) -> None:
    def two_rounds(transport: FakeTransport) -> tuple[FederationState, list[RoundResult]]:
        loop = federation(
            transport,
            controller=everyone(fraction_train=0.6, server_steps=1),
            server_training=server_adding(0.3),
            optimizer=ServerOptimizer(rule, 0.7),
        )
        state, results = start(0.1), []
        for _ in range(3):
            state, result = loop.run_round(state, None)
            results.append(result)
        return state, results

    def devices() -> dict[str, FakeDevice]:
        rng = np.random.default_rng(0)
        return {f"d{i}": FakeDevice(float(rng.normal()), 7 + i) for i in range(10)}

    state, results = two_rounds(FakeTransport(devices()))
    shuffled, shuffled_results = two_rounds(FakeTransport(devices(), order=order))
    assert same(state, shuffled)
    assert [r.participants for r in results] == [r.participants for r in shuffled_results]


# --- bytes --------------------------------------------------------------------------------------


def test_bytes_are_the_length_of_what_was_sent_and_received() -> None:
    transport = three()
    _, result = federation(transport).run_round(start(), None)
    assert result.bytes_down == sum(len(content) for _, _, content in transport.sent)
    assert result.bytes_up == sum(len(content) for _, _, content in transport.received)
    for name in "abc":
        own = of(result, name)
        assert own.bytes_down == sum(len(c) for _, node, c in transport.sent if node == name)
        assert own.bytes_up == sum(len(c) for _, node, c in transport.received if node == name)


def test_emulator_is_sent_once_and_only_to_those_that_lack_it() -> None:
    transport = three()
    transport.devices["b"].held.add(RUNG.sha256)
    loop = federation(transport)
    state, first = loop.run_round(start(), None)
    assert [node for kind, node, _ in transport.sent if kind == "hold"] == ["a", "c"]
    assert of(first, "a").bytes_down - of(first, "b").bytes_down == len(HOLD)

    transport.sent.clear()
    _, second = loop.run_round(state, None)
    assert [kind for kind, _, _ in transport.sent] == ["hello"] * 3 + ["train"] * 3
    assert second.bytes_down == sum(len(content) for _, _, content in transport.sent)


def test_those_outside_the_cohort_get_a_hello_and_no_more() -> None:
    transport = three()
    plan = RoundPlan((ClientPlan("b", "emulator", 2),), server_steps=0)
    _, result = federation(transport, controller=PlanOf(lambda _: plan)).run_round(start(), None)
    assert [(kind, node) for kind, node, _ in transport.sent] == [
        ("hello", "a"),
        ("hello", "b"),
        ("hello", "c"),
        ("hold", "b"),
        ("train", "b"),
    ]
    assert [r.client_id for r in result.participants] == ["b"]
    assert result.bytes_down == sum(len(content) for _, _, content in transport.sent)


# --- devices that fail --------------------------------------------------------------------------


def sending_more(content: bytes) -> Reply:
    update = update_of(decode(content), 1.0)
    return Reply("c", encode(Payload({**update.arrays, "embed": np.ones(9)}, update.record)))


LEAVES_OUT_C: dict[str, tuple[tuple[str, str], Script, str, str]] = {
    "failing": (("train", "c"), failing("RuntimeError: out of memory"), "failed", "out of memory"),
    "failing for no reason": (("train", "c"), failing(""), "failed", "no reason given"),
    "dropping out": (("train", "c"), failing("gone", lost=True), "dropped", "gone"),
    "too late": (("train", "c"), silent, "late", "no reply before the round closed"),
    "junk": (("train", "c"), saying(b"\x00junk"), "rejected", "not a fedpeat message of 5 bytes"),
    "empty": (("train", "c"), saying(b""), "rejected", "not a fedpeat message of 0 bytes"),
    "NaN": (("train", "c"), updating(math.nan), "rejected", "not finite"),
    "far off": (("train", "c"), updating(1e30), "rejected", "update norm must be at most 100"),
    "stale": (("train", "c"), updating(server_round=0), "rejected", "server_round must be 1"),
    "greedy": (("train", "c"), updating(4, 10**7), "rejected", "num_examples must be"),
    "seconds as a number": (("train", "c"), updating(seconds=0.1), "rejected", "such as '00012.3"),
    "seconds cut": (("train", "c"), updating(seconds="0.1"), "rejected", "got '0.1'"),
    "seconds NaN": (("train", "c"), updating(seconds="nan"), "rejected", "got 'nan'"),
    "an empty record": (("train", "c"), saying(Payload(adapter())), "rejected", "got None"),
    "sending its model": (("train", "c"), sending_more, "rejected", "unexpected: embed (1 in all)"),
    "no emulator": (("hold", "c"), failing("disk full"), "failed", "disk full"),
    "slow download": (("hold", "c"), silent, "late", "no reply before the round closed"),
}


@pytest.mark.parametrize("case", LEAVES_OUT_C)
def test_one_bad_device_is_named_and_leaves_the_average_untouched(case: str) -> None:
    where, script, status, reason = LEAVES_OUT_C[case]
    transport = three({where: script})
    transport.devices["a"].delta, transport.devices["b"].delta = 0.1, 1 / 3
    changes: dict[str, Any] = {"limits": Limits(1000, 100.0), "deadline_seconds": 0.05}
    state, result = federation(transport, **changes).run_round(start(0.7), None)
    assert of(result, "c").status == status
    assert reason in of(result, "c").reason
    assert (of(result, "c").weight, of(result, "c").num_tokens) == (0.0, 0)

    both = FakeTransport({"a": FakeDevice(0.1, 10), "b": FakeDevice(1 / 3, 20)})
    without, _ = federation(both, **changes).run_round(start(0.7), None)
    assert same(state, without)
    assert of(result, "a").weight == 1 / 3


def test_a_late_device_is_welcome_again_in_the_next_round() -> None:
    transport = three({("train", "c"): silent})
    loop = federation(transport, deadline_seconds=0.05)
    state, first = loop.run_round(start(), None)
    del transport.scripts["train", "c"]
    _, second = loop.run_round(state, None)
    assert [of(r, "c").status for r in (first, second)] == ["late", "accepted"]


def test_the_loop_waits_until_the_deadline_and_no_longer(clock: FakeClock) -> None:
    transport = three({("train", "c"): silent})
    transport.interval_seconds = 0.3
    federation(transport, deadline_seconds=2.0).run_round(start(), None)
    assert clock.monotonic() == pytest.approx(2.1)  # the first look after two seconds


class OneByOne(FakeTransport):
    """Brings the replies one at a time, in the order of the devices' names."""

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        first = min(tickets.items(), key=lambda item: item[1])
        return super().poll(dict([first]))


@pytest.mark.parametrize(
    ("ratio", "statuses"),
    [(0.34, ["accepted", "accepted", "late"]), (0.3, ["accepted", "late", "late"])],
)
def test_a_quorum_closes_a_round(ratio: float, statuses: list[str]) -> None:
    transport = OneByOne(three().devices)
    _, result = federation(transport, quorum_ratio=ratio).run_round(start(), None)
    assert [of(result, name).status for name in "abc"] == statuses


def test_replies_without_an_update_do_not_count_for_a_quorum() -> None:
    transport = OneByOne(three().devices, {("train", "a"): failing("broken")})
    _, result = federation(transport, quorum_ratio=0.3).run_round(start(), None)
    assert [of(result, name).status for name in "abc"] == ["failed", "accepted", "late"]


def test_without_a_deadline_the_loop_waits_however_long_it_takes(clock: FakeClock) -> None:
    class Slow(FakeTransport):
        def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
            clock.sleep(86_400.0)
            return super().poll(tickets)

    _, result = federation(Slow(three().devices)).run_round(start(), None)
    assert {r.status for r in result.participants} == {"accepted"}


def test_a_device_without_its_emulator_is_not_asked_to_train() -> None:
    transport = three({("hold", "c"): failing("disk full")})
    _, result = federation(transport).run_round(start(), None)
    assert ("train", "c") not in {(kind, node) for kind, node, _ in transport.sent}
    sent = sum(len(content) for _, node, content in transport.sent if node == "c")
    assert of(result, "c").bytes_down == sent


def test_the_reason_is_one_short_line() -> None:
    transport = three({("train", "c"): failing("Traceback:\n  " + "x\n" * 10_000)})
    _, result = federation(transport).run_round(start(), None)
    assert len(of(result, "c").reason) <= 300
    assert "\n" not in of(result, "c").reason


def test_a_reply_with_a_million_entries_is_refused() -> None:
    many = saying(Payload(adapter(), {"entries": [0] * 10**6}))
    _, result = federation(three({("train", "c"): many})).run_round(start(), None)
    assert of(result, "c").status == "rejected"


def test_a_reply_with_many_tensors_is_refused() -> None:
    def many(content: bytes) -> Reply:
        tensors = {f"t{i}": np.zeros(1, np.float32) for i in range(10_000)}
        record = update_of(decode(content), 1.0).record
        return Reply("c", encode(Payload(tensors, record)))

    _, result = federation(three({("train", "c"): many})).run_round(start(), None)
    assert "10002 in all" in of(result, "c").reason


# --- the network --------------------------------------------------------------------------------


def test_replies_that_nobody_asked_for_are_ignored() -> None:
    transport = three()
    transport.strays = [("ticket-999", Reply("a", b"hostile")), ("", Reply("x", error="?"))]
    state, result = federation(transport).run_round(start(), None)
    want, _ = federation(three()).run_round(start(), None)
    assert same(state, want)
    assert result.bytes_up == sum(len(content) for _, _, content in transport.received)


def test_the_first_reply_to_a_ticket_counts_and_who_it_says_it_is_does_not() -> None:
    class Repeating(FakeTransport):
        def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
            arrived = super().poll(tickets)
            return [*arrived, *[(t, Reply("a", b"again")) for t, _ in arrived]]

    transport = Repeating(three().devices)
    state, _ = federation(transport).run_round(start(), None)
    want, _ = federation(three()).run_round(start(), None)
    assert same(state, want)


def raising(name: str, when: Callable[[str], bool]) -> FakeTransport:
    def method(self: FakeTransport, *arguments: Any) -> Any:
        kind = arguments[0] if name == "submit" else ""
        if when(kind):
            raise ConnectionError("link down")
        return getattr(FakeTransport, name)(self, *arguments)

    kind_of = type("Raising", (FakeTransport,), {name: method})
    transport: FakeTransport = kind_of(three().devices)
    return transport


@pytest.mark.parametrize(
    ("transport", "doing"),
    [
        (raising("nodes", lambda _: True), "asking for its nodes"),
        (raising("submit", lambda kind: kind == "hello"), "sending 'hello' tasks"),
        (raising("submit", lambda kind: kind == "train"), "sending 'train' tasks"),
        (raising("poll", lambda _: True), "waiting for 'hello' replies"),
    ],
    ids=["nodes", "submit hello", "submit train", "poll"],
)
def test_a_transport_that_raises_ends_the_run_with_one_clear_line(
    transport: FakeTransport, doing: str
) -> None:
    want = f"round 1: the transport failed while {doing}: ConnectionError: link down"
    with pytest.raises(AggregationError, match=f"^{want}$") as error:
        federation(transport).run_round(start(), None)
    assert isinstance(error.value.__cause__, ConnectionError)


def test_an_error_of_the_servers_own_training_is_not_blamed_on_the_transport() -> None:
    def training(*_: object) -> Payload:
        raise MemoryError("too large")

    loop = federation(three(), controller=everyone(server_steps=1), server_training=training)
    with pytest.raises(MemoryError, match="too large"):
        loop.run_round(start(), None)


# --- hellos -------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """Return a message whose record is too deep for json.dumps to write."""
    deep = "[" * depth + "]" * depth
    text = f'{{"schema": 1, "record": {{"held": {deep}, "num_examples": 1}}}}'
    header = json.dumps({"__metadata__": {"fedpeat": text}}).encode()
    return len(header).to_bytes(8, "little") + header


def hello(**record: Any) -> Script:
    return saying(Payload(record={"num_examples": 30, "held": [], "emulator_parts": [], **record}))


HOSTILE_HELLOS: dict[str, tuple[Script, str]] = {
    "empty": (saying(b""), "not a fedpeat message"),
    "junk": (saying(bytes(range(256))), "not a fedpeat message"),
    "cut short": (saying(encode(Payload())[:-3]), "not a fedpeat message"),
    "huge header length": (saying(b"\xff" * 8 + b"{}"), "not a fedpeat message"),
    "not UTF-8": (saying((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc"), "not a fedpeat message"),
    "nothing": (saying(Payload()), "num_examples must be .* got None"),
    "True examples": (hello(num_examples=True), "num_examples must be .* got True"),
    "no examples": (hello(num_examples=0), "num_examples must be .* got 0"),
    "negative examples": (hello(num_examples=-5), "got -5"),
    "10^400 examples": (hello(num_examples=10**400), "num_examples must be"),
    "examples as text": (hello(num_examples="30"), "got '30'"),
    "held is None": (hello(held=None), "held must be a list of hashes, got None"),
    "held is text": (hello(held="abc"), "held must be a list of hashes, got 'abc'"),
    "held is a mapping": (hello(held={"a": 1}), "held must be a list of hashes"),
    "held has numbers": (hello(held=[1]), r"got \[1\]"),
    "held has lists": (hello(held=[["a"]]), "held must be a list of hashes"),
    "held has mappings": (hello(held=[{"a": {}}]), "held must be a list of hashes"),
    "deep": (saying(nested(900)), "held must be|not a fedpeat message"),
    "too deep": (saying(nested(100_000)), "not a fedpeat message"),
    "an error": (failing("no such kind"), "no such kind"),
    "an update": (saying(Payload(adapter(), {"num_examples": 3})), "held must be"),
}


@pytest.mark.parametrize("name", HOSTILE_HELLOS)
def test_hostile_hello_sits_out_with_a_warning(name: str) -> None:
    script, reason = HOSTILE_HELLOS[name]
    state, result = federation(three({("hello", "c"): script})).run_round(start(), None)
    assert value_of(state) == pytest.approx((10 * 1 + 20 * 2) / 30)
    assert [r.client_id for r in result.participants] == ["a", "b"]
    (warning,) = result.warnings
    assert warning.startswith("'c' sits out: ")
    assert re.search(reason, warning)


def test_random_hellos_never_end_the_round() -> None:
    rng = np.random.default_rng(0)
    proper = bytearray(
        encode(
            Payload(
                {"w": np.ones(2, np.float32)}, {"num_examples": 3, "held": [], "emulator_parts": []}
            )
        )
    )
    for _ in range(100):
        damaged = bytes(proper[: rng.integers(len(proper) + 1)])
        flips = dict(zip(rng.integers(len(proper), size=3), rng.integers(256, size=3), strict=True))
        flipped = bytes(flips.get(i, byte) for i, byte in enumerate(proper))
        scripts = {("hello", "b"): saying(damaged), ("hello", "c"): saying(flipped)}
        _, result = federation(three(scripts)).run_round(start(), None)
        assert "a" in {r.client_id for r in result.participants}


def test_a_silent_node_sits_out() -> None:
    loop = federation(three({("hello", "c"): silent}), deadline_seconds=0.05)
    _, result = loop.run_round(start(), None)
    assert result.warnings == ("'c' sits out: no answer before the deadline",)
    assert [r.client_id for r in result.participants] == ["a", "b"]


def test_emulators_of_other_runs_and_repeated_ones_are_no_news() -> None:
    controller = PlanOf(everyone().plan)
    held = ["f" * 64, RUNG.sha256, RUNG.sha256, ""]
    transport = three({("hello", "a"): hello(held=held)})
    transport.devices["a"].held.add(RUNG.sha256)
    federation(transport, controller=controller).run_round(start(), None)
    assert controller.seen[0].clients[0].held_rungs == ("emulator",)


def test_a_device_that_claims_another_ones_name_stays_itself() -> None:
    transport = three({("hello", "c"): hello(client_id="a")})
    _, result = federation(transport).run_round(start(), None)
    assert [r.client_id for r in result.participants] == ["a", "b", "c"]


def test_a_node_listed_twice_is_asked_once() -> None:
    transport = three()
    transport.nodes = lambda: ["a", "b", "a"]  # type: ignore[method-assign]
    _, result = federation(transport).run_round(start(), None)
    assert [r.client_id for r in result.participants] == ["a", "b"]


def test_a_device_cannot_pass_for_the_server() -> None:
    transport = FakeTransport({"a": FakeDevice(1), "server": FakeDevice(100)})
    loop = federation(
        transport,
        controller=everyone(server_steps=1),
        server_training=server_adding(3),
        server_weight_ratio=0.5,
    )
    state, result = loop.run_round(start(), None)
    assert value_of(state) == 2.0
    assert result.warnings == ("'server' sits out: no device may be called 'server'",)


# --- the server's part --------------------------------------------------------------------------


def with_server(ratio: float | None, **changes: Any) -> Federation:
    return federation(
        changes.pop("transport", None) or three(),
        controller=everyone(server_steps=5),
        server_training=changes.pop("server_training", server_adding(8.0, num_examples=60)),
        server_weight_ratio=ratio,
        **changes,
    )


def test_server_weighs_by_its_examples_unless_told_otherwise() -> None:
    state, result = with_server(None).run_round(start(), None)
    assert of(result, "server").weight == 0.5
    assert of(result, "server").role == "server"
    assert value_of(state) == pytest.approx((10 * 1 + 20 * 2 + 30 * 4 + 60 * 8) / 120)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.9])
def test_server_weight_ratio_is_exact(ratio: float) -> None:
    state, result = with_server(ratio).run_round(start(), None)
    weights = {r.client_id: r.weight for r in result.participants}
    assert weights["server"] == ratio
    devices = {"a": 1 / 6, "b": 1 / 3, "c": 1 / 2}
    assert {c: weights[c] for c in "abc"} == pytest.approx(
        {c: share * (1 - ratio) for c, share in devices.items()}
    )
    assert value_of(state) == pytest.approx(ratio * 8 + (1 - ratio) * 170 / 60)


def test_server_alone_gets_all_the_weight_whatever_its_ratio() -> None:
    loop = with_server(0.3, transport=FakeTransport({}))
    state, result = loop.run_round(start(), None)
    assert (value_of(state), of(result, "server").weight) == (8.0, 1.0)


def test_server_bytes_are_none_and_its_losses_are_kept() -> None:
    state, result = with_server(None).run_round(start(), None)
    assert (of(result, "server").bytes_down, of(result, "server").bytes_up) == (0, 0)
    assert state.last_losses["server"] == 2.5


def test_a_server_whose_training_diverged_is_left_out_too() -> None:
    loop = with_server(0.5, server_training=server_adding(math.nan))
    state, result = loop.run_round(start(), None)
    assert of(result, "server").status == "rejected"
    assert value_of(state) == pytest.approx(170 / 60)


def test_server_trains_while_the_devices_work() -> None:
    transport = three()
    seen: list[int] = []

    def training(*arguments: Any) -> Payload:
        seen.append(len([kind for kind, _, _ in transport.sent if kind == "train"]))
        return server_adding(1.0)(*arguments)

    with_server(None, transport=transport, server_training=training).run_round(start(), None)
    assert seen == [3]


# --- too few ------------------------------------------------------------------------------------


def test_min_clients_counts_accepted_updates_with_the_servers() -> None:
    one_bad = {("train", "c"): updating(math.nan)}
    state, _ = with_server(None, transport=three(one_bad), min_clients=3).run_round(start(), None)
    assert value_of(state) > 0
    state, _ = with_server(None, transport=three(one_bad), min_clients=4).run_round(start(), None)
    assert value_of(state) == 0


def test_a_barren_round_keeps_adapter_and_moments_and_says_so() -> None:
    loop = federation(three(), optimizer=ServerOptimizer("fedadam", 0.1))
    good, _ = loop.run_round(start(0.3), None)
    transport = three({("train", "a"): failing("oom"), ("train", "b"): failing("oom")})
    barren = federation(transport, min_clients=2)
    state, result = barren.run_round(good, None)
    assert same(state, good)
    assert state.moments is good.moments
    assert (state.server_round, state.num_barren_rounds) == (2, 1)
    assert result.update_norm == 0.0
    assert [r.weight for r in result.participants] == [0.0, 0.0, 0.0]
    assert of(result, "c").status == "accepted"
    assert result.warnings == (
        "the adapter stays as it was: 1 updates accepted, 2 wanted; a failed: oom; b failed: oom",
    )


def run_rounds(loop: Federation, state: FederationState, num_rounds: int) -> FederationState:
    for _ in range(num_rounds):
        state, _ = loop.run_round(state, None)
    return state


def test_three_barren_rounds_in_a_row_end_the_run_and_name_the_first_reasons() -> None:
    scripts = {("train", name): failing(f"{name} is out of memory") for name in "abc"}
    transport = three(scripts)
    transport.scripts["hello", "d"] = saying(b"")
    transport.devices["d"] = FakeDevice()
    loop = federation(transport)
    state = run_rounds(loop, start(), 2)
    with pytest.raises(AggregationError) as error:
        loop.run_round(state, None)
    assert str(error.value) == (
        "round 3, the last of 3 in a row without enough updates: 0 updates accepted, 1 wanted; "
        "a failed: a is out of memory; b failed: b is out of memory; c failed: c is out of memory; "
        "and 1 more"
    )
    assert error.value.exit_code == 1


def test_without_any_device_the_run_ends_and_says_that_nobody_took_part() -> None:
    loop = federation(FakeTransport({}))
    state = run_rounds(loop, start(), 2)
    with pytest.raises(AggregationError, match="0 updates accepted, 1 wanted; nobody took part$"):
        loop.run_round(state, None)


def test_when_no_device_answers_hello_the_reasons_are_named() -> None:
    scripts = {("hello", name): failing("another version") for name in "abc"}
    loop = federation(three(scripts))
    state = run_rounds(loop, start(), 2)
    with pytest.raises(AggregationError, match="'a' sits out: another version; 'b' sits out"):
        loop.run_round(state, None)


def test_a_good_round_between_barren_ones_starts_the_count_anew() -> None:
    transport = three()
    loop = federation(transport)
    all_fail = {("train", name): failing("oom") for name in "abc"}
    state, counts = start(), []
    for good in (False, False, True, False, False):
        transport.scripts = {} if good else dict(all_fail)
        state, _ = loop.run_round(state, None)
        counts.append(state.num_barren_rounds)
    assert counts == [1, 2, 0, 1, 2]


# --- plans that make no sense -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "server_steps", "wrong"),
    [
        (["ghost"], 0, "round 1: the plan names, but nobody knows, client 'ghost'"),
        (["a", "b", "a"], 0, "round 1: the plan names twice client 'a'"),
        ([ClientPlan("a", "huge", 2)], 0, "wants the rung 'huge', not one of .'emulator'., for"),
        ([ClientPlan("a", "emulator", 0)], 0, "wants 0 local steps, not at least 1, of client 'a'"),
        (["a"], -1, "server_steps must be at least 0, got -1"),
    ],
    ids=["unknown client", "client twice", "unknown rung", "no steps", "negative server steps"],
)
def test_a_plan_that_makes_no_sense_is_a_clear_error(
    cohort: list[Any], server_steps: int, wrong: str
) -> None:
    clients = [ClientPlan(c, "emulator", 2) if isinstance(c, str) else c for c in cohort]
    plan = RoundPlan(tuple(clients), server_steps)
    transport = three()
    with pytest.raises(AggregationError, match=wrong):
        federation(transport, controller=PlanOf(lambda _: plan)).run_round(start(), None)
    assert {kind for kind, _, _ in transport.sent} == {"hello"}


def test_an_empty_plan_is_a_rest_and_not_a_failure() -> None:
    loop = federation(three(), controller=PlanOf(lambda _: RoundPlan((), 0)))
    state, result = loop.run_round(start(), None)
    assert (state.server_round, state.num_barren_rounds) == (1, 0)
    assert result.update_norm == 0
    assert not result.warnings


def test_nobody_there_is_a_barren_round() -> None:
    loop = federation(FakeTransport({}), controller=PlanOf(lambda _: RoundPlan((), 0)))
    state, _ = loop.run_round(start(), None)
    assert (state.server_round, state.num_barren_rounds) == (1, 1)


def test_an_update_that_a_simulated_world_loses_is_neither_asked_for_nor_counted() -> None:
    transport = three()
    cohort = (
        ClientPlan("a", "emulator", 2),
        ClientPlan("b", "emulator", 2, lost="it gave up on the way"),
    )
    plan = RoundPlan(cohort, 0, simulated={"seconds": 2.5})
    _, result = federation(transport, controller=PlanOf(lambda _: plan)).run_round(start(), None)
    sent = [(kind, node) for kind, nodes, _ in transport.sent for node in nodes]
    assert ("hold", "b") in sent
    assert ("train", "a") in sent
    assert ("train", "b") not in sent
    lost = next(p for p in result.participants if p.client_id == "b")
    assert (lost.status, lost.reason, lost.weight) == ("dropped", "it gave up on the way", 0.0)
    assert result.simulated == {"seconds": 2.5}


def test_alignment_that_cannot_be_is_a_clear_error() -> None:
    plan = RoundPlan((ClientPlan("a", "emulator", 2),), 0, realigns=True)
    with pytest.raises(AggregationError, match="round 1: the plan aligns emulators anew, which"):
        federation(three(), controller=PlanOf(lambda _: plan)).run_round(start(), None)


# --- quality ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "new", "old", "want"),
    [
        ("perplexity", 2.0, 3.0, True),
        ("perplexity", 3.0, 2.0, False),
        ("perplexity", 2.0, 2.0, False),
        ("accuracy", 0.9, 0.8, True),
        ("accuracy", 0.8, 0.9, False),
        ("perplexity", 2.0, None, True),
        ("perplexity", math.nan, None, False),
        ("perplexity", math.nan, 3.0, False),
        ("perplexity", 3.0, math.inf, True),
    ],
)
def test_better_is_lower_perplexity_and_higher_accuracy(
    metric: str, new: float, old: float | None, *, want: bool
) -> None:
    assert is_better(metric, new, old) is want
