"""The round loop with LoRA: what is tuned, sent and averaged, against dense NumPy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fakes import (
    RUNG,
    FakeDevice,
    FakeTransport,
    PlanOf,
    Script,
    everyone,
    failing,
    federation,
    saying,
    update_of,
)
from fedpeat.adapter.lora import Part, lora_pairs, part_of
from fedpeat.core.records import ClientPlan, Reply, RoundPlan
from fedpeat.core.wire import Payload, decode, digest, encode
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.rounds import Federation, FederationState
from fedpeat.federated.screening import Limits

R = 4
SHAPES = {"q_proj": (11, 9), "up_proj": (14, 8)}  # d_out, d_in
NUM_EXAMPLES = {"a": 10, "b": 20, "c": 30}
SHARES = [1 / 6, 1 / 3, 1 / 2]
State = dict[str, np.ndarray]


def start() -> FederationState:
    """Return the state before the first round: A random, B zero."""
    rng = np.random.default_rng(99)
    adapter: State = {}
    for name, (d_out, d_in) in SHAPES.items():
        adapter[f"{name}.lora_A.weight"] = rng.normal(size=(R, d_in)).astype(np.float32)
        adapter[f"{name}.lora_B.weight"] = np.zeros((d_out, R), np.float32)
    return FederationState(0, adapter)


@dataclass
class LoraDevice(FakeDevice):
    """Adds noise to what it is told to tune, and keeps what it is told to freeze.

    Attributes:
        seed: Of the noise.
        kept: What its last task froze.
        trained: The whole adapter after each task.
    """

    seed: int = 0
    kept: State = field(default_factory=dict)
    trained: list[State] = field(default_factory=list)

    def answer(self, kind: str, content: bytes) -> bytes:
        if kind == "hold":
            return super().answer(kind, content)
        task = decode(content)
        if kind == "hello":
            known = digest(self.kept) in task.record.get("parts", [])
            record = {
                "num_examples": self.num_examples,
                "held": sorted(self.held),
                "emulator_parts": sorted(self.parts),
            }
            return encode(Payload(record=record | ({"kept": digest(self.kept)} if known else {})))
        left_out = task.record["left_out"]
        assert left_out in {"", digest(self.kept)}
        adapter: State = {**task.arrays, **(self.kept if left_out else {})}
        rng = np.random.default_rng([self.seed, len(self.trained)])
        tuned = {
            name: (array + rng.normal(0, 0.3, array.shape)).astype(np.float32)
            for name, array in sorted(part_of(adapter, task.record["tuned"]).items())
        }
        self.kept = {n: a for n, a in adapter.items() if n not in tuned}
        self.trained.append(adapter | tuned)
        return encode(Payload(tuned, update_of(task, 0.0, self.num_examples).record))


def three(scripts: dict[tuple[str, str], Script] | None = None) -> FakeTransport:
    devices = {
        c: LoraDevice(num_examples=n, seed=seed) for seed, (c, n) in enumerate(NUM_EXAMPLES.items())
    }
    return FakeTransport(devices, scripts)


def trained_in(transport: FakeTransport, index: int) -> list[State]:
    """Return each device's whole adapter after its training, by device."""
    states = []
    for device in transport.devices.values():
        assert isinstance(device, LoraDevice)
        states.append(device.trained[index])
    return states


def with_lora(
    transport: FakeTransport, rule: str, ranks: dict[str, int] | None = None, **changes: Any
) -> Federation:
    return federation(transport, lora=LoraAggregation(rule, ranks or {}), **changes)


def products(state: Any) -> dict[str, np.ndarray]:
    exact = {n: a.astype(np.float64) for n, a in state.items()}
    return {name_b: exact[name_b] @ exact[name_a] for name_a, name_b in lora_pairs(state)}


def mean_of(states: Sequence[Any], shares: Sequence[float]) -> dict[str, np.ndarray]:
    """Return the average of tensors, or of dense products."""
    return {n: np.average([s[n] for s in states], axis=0, weights=shares) for n in states[0]}


def dense_error(states: list[State]) -> float:
    wanted = mean_of([products(s) for s in states], SHARES)
    got = products(mean_of(states, SHARES))
    errors = sum(np.sum((wanted[n] - got[n]) ** 2) for n in wanted)
    return float(np.sqrt(errors / sum(np.sum(w**2) for w in wanted.values())))


def parts_sent(transport: FakeTransport, kind: str = "train") -> list[set[str]]:
    """Return which factors each message of a kind had, and forget them."""
    contents = [content for k, _, content in transport.sent if k == kind]
    transport.sent.clear()
    return [{name.split(".")[1] for name in decode(content).arrays} for content in contents]


def parts_received(transport: FakeTransport) -> list[set[str]]:
    contents = [content for kind, _, content in transport.received if kind == "train"]
    transport.received.clear()
    return [{name.split(".")[1] for name in decode(content).arrays} for content in contents]


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_frozen_factors_make_the_average_of_products_exact(rule: str) -> None:
    transport = three()
    loop, state = with_lora(transport, rule), start()
    for index in range(4):
        state, result = loop.run_round(state, None)
        trained = [products(s) for s in trained_in(transport, index)]
        got, want = products(state.adapter), mean_of(trained, SHARES)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-6)
        assert result.product_error is not None
        assert result.product_error < 1e-15


def test_averaging_both_factors_is_inexact_and_the_error_says_by_how_much() -> None:
    transport = three()
    loop, state = with_lora(transport, "average"), start()
    for index in range(2):
        state, result = loop.run_round(state, None)
        trained = trained_in(transport, index)
        assert result.product_error == pytest.approx(dense_error(trained))
        assert dense_error(trained) > 0.01
        want = mean_of(trained, SHARES)
        for name, array in state.adapter.items():
            np.testing.assert_allclose(array, want[name], atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"a": 1, "c": 3}], ids=["one rank", "three ranks"])
def test_svd_is_the_best_approximation_of_the_average_of_products(ranks: dict[str, int]) -> None:
    transport = three()
    loop, state = with_lora(transport, "svd", ranks), start()
    for index in range(3):
        state, result = loop.run_round(state, None)
        trained = [products(s) for s in trained_in(transport, index)]
        got = products(state.adapter)
        for name, want in mean_of(trained, SHARES).items():
            u, s, vt = np.linalg.svd(want)
            np.testing.assert_allclose(got[name], (u[:, :R] * s[:R]) @ vt[:R], atol=2e-6)
        assert result.product_error is not None
        assert result.product_error > 0.01
    assert {n: a.shape for n, a in state.adapter.items()} == {
        n: a.shape for n, a in start().adapter.items()
    }


def test_the_servers_update_counts_in_the_average_of_products() -> None:
    def training(current: State, tuned: Part, *_: int) -> Payload:
        return update_of(Payload(part_of(current, tuned)), 0.5, num_examples=60, seconds=0.1)

    transport = three()
    loop = with_lora(
        transport, "svd", {"a": 2}, controller=everyone(server_steps=1), server_training=training
    )
    state, result = loop.run_round(start(), None)
    assert [p.weight for p in result.participants] == pytest.approx([1 / 12, 1 / 6, 1 / 4, 1 / 2])
    own = {n: a + np.float32(0.5) for n, a in start().adapter.items()}
    states = [products(s) for s in [*trained_in(transport, 0), own]]
    for name, want in mean_of(states, [1 / 12, 1 / 6, 1 / 4, 1 / 2]).items():
        u, s, vt = np.linalg.svd(want)
        got = products(state.adapter)[name]
        np.testing.assert_allclose(got, (u[:, :R] * s[:R]) @ vt[:R], atol=2e-6)


# --- ranks ----------------------------------------------------------------------------------------


def tasks_of(transport: FakeTransport) -> dict[str, Payload]:
    return {node: decode(content) for kind, node, content in transport.sent if kind == "train"}


def test_a_device_gets_the_leading_directions_of_the_adapter_at_its_rank() -> None:
    transport = three()
    loop = with_lora(transport, "svd", {"a": 1, "c": 3})
    state, _ = loop.run_round(start(), None)
    transport.sent.clear()
    loop.run_round(state, None)
    tasks = tasks_of(transport)
    assert {node: task.record["rank"] for node, task in tasks.items()} == {
        "a": 1,
        "b": None,
        "c": 3,
    }
    for name, dense in products(state.adapter).items():
        u, s, vt = np.linalg.svd(dense)
        for node, rank in (("a", 1), ("b", R), ("c", 3)):
            got = products(tasks[node].arrays)[name]
            np.testing.assert_allclose(got, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)
    assert {n: a.tobytes() for n, a in tasks["b"].arrays.items()} == {
        n: a.tobytes() for n, a in state.adapter.items()
    }


def test_a_lower_rank_costs_fewer_bytes_both_ways() -> None:
    transport = three()
    _, result = with_lora(transport, "svd", {"a": 1}).run_round(start(), None)
    small, large = (next(p for p in result.participants if p.client_id == c) for c in "ab")
    saved = sum(3 * sum(shape) * 4 for shape in SHAPES.values())  # rows and columns of float32
    assert large.bytes_down - small.bytes_down == pytest.approx(saved, abs=16)  # padded headers
    assert large.bytes_up - small.bytes_up == pytest.approx(saved, abs=16)


# --- what travels ---------------------------------------------------------------------------------


def test_ffa_sends_a_once_and_b_alone_from_then_on() -> None:
    transport = three()
    loop, state = with_lora(transport, "ffa"), start()
    down = []
    for _ in range(3):
        state, _ = loop.run_round(state, None)
        down += parts_sent(transport)
    assert down == 3 * [{"lora_A", "lora_B"}] + 6 * [{"lora_B"}]
    assert parts_received(transport) == 9 * [{"lora_B"}]
    for name, array in part_of(start().adapter, "lora_A").items():
        assert state.adapter[name].tobytes() == array.tobytes()


def test_rolora_sends_b_and_a_in_turn_and_down_only_what_is_new() -> None:
    transport = three()
    loop, state = with_lora(transport, "rolora"), start()
    down = []
    for _ in range(4):
        state, _ = loop.run_round(state, None)
        down.append(parts_sent(transport))
    assert [set(map(frozenset, parts)) for parts in down] == [
        {frozenset({"lora_A", "lora_B"})},
        {frozenset({"lora_B"})},  # as round 1 left it, to be frozen now
        {frozenset({"lora_A"})},
        {frozenset({"lora_B"})},
    ]
    assert parts_received(transport) == [
        {part} for part in ("lora_B", "lora_A", "lora_B", "lora_A") for _ in range(3)
    ]


def test_a_part_travels_in_half_the_bytes() -> None:
    def bytes_of(rule: str) -> tuple[int, int]:
        transport = three()
        loop = with_lora(transport, rule)
        state, _ = loop.run_round(start(), None)
        _, result = loop.run_round(state, None)
        hellos = 3 * len(next(c for kind, _, c in transport.sent if kind == "hello"))
        hellos_back = sum(len(c) for kind, _, c in transport.received[-6:] if kind == "hello")
        return result.bytes_down - hellos, result.bytes_up - hellos_back

    def tensors(part: Part) -> int:
        return 3 * sum(a.nbytes for a in part_of(start().adapter, part).values())

    plain, half = bytes_of("average"), bytes_of("ffa")
    names = 3 * 2 * 120  # of two tensors that do not travel, in the headers
    for one, other in zip(plain, half, strict=True):
        assert tensors("lora_A") < one - other + 3 * 64 < tensors("lora_A") + names


def test_a_device_that_missed_a_round_is_sent_what_it_lacks() -> None:
    cohorts = ["ab", "ab", "bc", "abc"]

    def plan(_: Any) -> RoundPlan:
        cohort = cohorts[len(controller.seen) - 1]
        return RoundPlan(tuple(ClientPlan(c, "emulator", 2) for c in cohort), server_steps=0)

    controller = PlanOf(plan)
    transport = three()
    loop, state = with_lora(transport, "rolora", controller=controller), start()
    down = []
    for cohort in cohorts:
        state, _ = loop.run_round(state, None)
        down.append(dict(zip(cohort, parts_sent(transport), strict=True)))
    both = {"lora_A", "lora_B"}
    assert down == [
        {"a": both, "b": both},
        {"a": {"lora_B"}, "b": {"lora_B"}},
        {"b": {"lora_A"}, "c": both},
        {"a": both, "b": {"lora_B"}, "c": {"lora_B"}},
    ]
    last = [client.kept_part for client in controller.seen[-1].clients]
    assert [bool(kept) for kept in last] == [False, True, True]


def test_a_device_that_lost_what_it_kept_is_sent_all_again() -> None:
    transport = three()
    loop = with_lora(transport, "ffa")
    state, _ = loop.run_round(start(), None)
    transport.sent.clear()
    transport.devices["b"] = LoraDevice(num_examples=20, held={RUNG.sha256})
    loop.run_round(state, None)
    assert parts_sent(transport) == [{"lora_B"}, {"lora_A", "lora_B"}, {"lora_B"}]


@pytest.mark.parametrize("kept", [None, 3, "", "f" * 64, ["x"], {"a": 1}], ids=str)
def test_a_hello_that_claims_what_was_not_asked_for_gains_nothing(kept: Any) -> None:
    held = {"held": [RUNG.sha256], "emulator_parts": []}
    record = {"num_examples": 30, **held, "kept": kept}
    transport = three({("hello", "c"): saying(Payload(record=record))})
    transport.devices["c"].held.add(RUNG.sha256)
    _, result = with_lora(transport, "ffa").run_round(start(), None)
    assert parts_sent(transport) == 3 * [{"lora_A", "lora_B"}]
    assert {p.status for p in result.participants} == {"accepted"}


def test_no_part_is_asked_for_where_all_of_the_adapter_changes_in_a_round() -> None:
    for rule in ("average", "svd"):
        transport = three()
        with_lora(transport, rule).run_round(start(), None)
        hellos = {content for kind, _, content in transport.sent if kind == "hello"}
        assert hellos == {encode(Payload())}


# --- screening ------------------------------------------------------------------------------------


def sending(part: Part) -> Script:
    """Return a script that sends back one part of the adapter, whatever was asked for."""

    def script(content: bytes) -> Reply:
        task = decode(content)
        return Reply("c", encode(Payload(part_of(task.arrays, part), update_of(task, 0).record)))

    return script


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        (
            "lora_A",
            "missing or unexpected: q_proj.lora_A.weight, q_proj.lora_B.weight, .*4 in all",
        ),
        ("all", "missing or unexpected: q_proj.lora_A.weight, up_proj.lora_A.weight .2 in all"),
    ],
)
@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_tensors_of_the_other_part_are_refused(rule: str, part: Part, wrong: str) -> None:
    transport = three({("train", "c"): sending(part)})
    state, result = with_lora(transport, rule).run_round(start(), None)
    refused = result.participants[2]
    assert refused.status == "rejected"
    assert re.search(wrong, refused.reason)
    for name, array in part_of(start().adapter, "lora_A").items():
        assert state.adapter[name].tobytes() == array.tobytes()


def test_factors_of_another_rank_than_the_devices_own_are_refused() -> None:
    def full_rank(content: bytes) -> Reply:
        return Reply("c", encode(Payload(start().adapter, update_of(decode(content), 0).record)))

    transport = three({("train", "c"): full_rank})
    _, result = with_lora(transport, "svd", {"c": 2}).run_round(start(), None)
    assert result.participants[2].status == "rejected"
    assert "lora_A.weight must be float32 (2, " in result.participants[2].reason


def test_the_norm_of_an_update_is_measured_from_what_its_device_was_sent() -> None:
    def unchanged(content: bytes) -> Reply:
        task = decode(content)
        return Reply("c", encode(Payload(task.arrays, update_of(task, 0).record)))

    transport = three({("train", "c"): unchanged})
    tight = Limits(max_examples=1000, max_update_norm=1e-9)
    _, result = with_lora(transport, "svd", {"c": 2}, limits=tight).run_round(start(), None)
    assert [p.status for p in result.participants] == ["rejected", "rejected", "accepted"]


# --- the server's side ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fedavgm", "fedadam", "fedyogi"])
def test_moments_move_only_with_the_tensors_that_a_round_averaged(rule: str) -> None:
    loop = with_lora(three(), "rolora", optimizer=ServerOptimizer(rule, 0.1))
    states = [start()]
    for _ in range(3):
        state, _ = loop.run_round(states[-1], None)
        states.append(state)
    for server_round, tuned in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        before, after = states[server_round - 1], states[server_round]
        moved = {n for n, m in after.moments.items() if not same(m, before.moments.get(n))}
        assert moved == {n for n in after.moments if tuned in n} != set()
        changed = {n for n, a in after.adapter.items() if not same(a, before.adapter[n])}
        assert changed == {n for n in after.adapter if tuned in n}
    assert not any("lora_A" in name for name in states[1].moments)


def same(one: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and one.tobytes() == other.tobytes()


def test_the_server_is_told_what_to_tune() -> None:
    told: list[Part] = []

    def training(current: State, tuned: Part, *_: int) -> Payload:
        told.append(tuned)
        assert current.keys() == start().adapter.keys()
        return update_of(Payload(part_of(current, tuned)), 0.5, seconds=0.1)

    loop = with_lora(
        three(), "rolora", controller=everyone(server_steps=1), server_training=training
    )
    state = start()
    for _ in range(3):
        state, result = loop.run_round(state, None)
        assert result.participants[-1].status == "accepted"
    assert told == ["lora_B", "lora_A", "lora_B"]


def test_a_server_that_tunes_the_other_part_is_left_out() -> None:
    def training(current: State, *_: Any) -> Payload:
        return update_of(Payload(current), 0.5, seconds=0.1)

    loop = with_lora(three(), "ffa", controller=everyone(server_steps=1), server_training=training)
    _, result = loop.run_round(start(), None)
    assert result.participants[-1].status == "rejected"


def test_a_round_that_averages_nothing_has_no_product_error() -> None:
    transport = three({("train", c): failing("oom") for c in NUM_EXAMPLES})
    state, result = with_lora(transport, "rolora").run_round(start(), None)
    assert result.product_error is None
    assert all(same(a, start().adapter[n]) for n, a in state.adapter.items())


def test_an_adapter_without_pairs_has_no_product_error() -> None:
    adapter = {"layer.ia3_l": np.ones((4, 1), np.float32)}
    transport = FakeTransport({"a": FakeDevice(1), "b": FakeDevice(2)})
    _, result = federation(transport).run_round(FederationState(0, adapter), None)
    assert result.product_error is None


def test_rounds_after_a_barren_one_tune_what_is_their_turn() -> None:
    transport = three({("train", c): failing("oom") for c in NUM_EXAMPLES})
    loop = with_lora(transport, "rolora")
    state, _ = loop.run_round(start(), None)
    transport.scripts.clear()
    transport.received.clear()
    loop.run_round(state, None)
    assert parts_received(transport) == 3 * [{"lora_A"}]
