"""Devices on different rungs in one round: who is sent what, and over whom is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fakes import (
    FakeDevice,
    FakeTransport,
    PlanOf,
    Script,
    federation,
    saying,
    server_adding,
    start,
)
from fedpeat.core.records import ClientPlan, RoundPlan
from fedpeat.core.wire import Payload, decode
from fedpeat.emulator.parts import short
from fedpeat.federated.admission import SERVER_ID
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.shelf import Rung

PARTS = {"1" * 64: b"common" * 30, "2" * 64: b"of the large one" * 40}
SMALL = Rung("a" * 64, {"1" * 64: PARTS["1" * 64]}, {"emulator": "a" * 64}, frozenset({"lora_A"}))
LARGE = Rung("b" * 64, PARTS, {"emulator": "b" * 64})
RUNGS = {"large": LARGE, "small": SMALL}


def devices(scripts: Mapping[tuple[str, str], Script] | None = None) -> FakeTransport:
    """Return devices a, b, c that add 1, 2, 4 and weigh 10, 20, 30."""
    three = {"a": FakeDevice(1, 10), "b": FakeDevice(2, 20), "c": FakeDevice(4, 30)}
    return FakeTransport(three, scripts)


def plan(server_steps: int = 0, **rungs: str) -> PlanOf:
    cohort = tuple(ClientPlan(name, rung, 2) for name, rung in rungs.items())
    return PlanOf(lambda _: RoundPlan(cohort, server_steps))


def run(transport: FakeTransport, controller: PlanOf, **changes: Any) -> Any:
    loop = federation(transport, rungs=RUNGS, controller=controller, **changes)
    return loop.run_round(start(), None)


def sent(transport: FakeTransport, kind: str) -> dict[str, Payload]:
    return {node: decode(content) for k, node, content in transport.sent if k == kind}


def values(state: Any) -> list[float]:
    return [float(state.adapter[name].reshape(-1)[0]) for name in ("lora_A", "lora_B")]


def test_a_tensor_is_averaged_over_those_whose_rung_has_it() -> None:
    state, result = run(devices(), plan(a="large", b="small", c="small"))
    assert values(state) == pytest.approx([(10 * 1 + 20 * 2 + 30 * 4) / 60, 1])
    assert [(p.client_id, p.rung) for p in result.participants] == [
        ("a", "large"),
        ("b", "small"),
        ("c", "small"),
    ]


def test_the_server_has_every_tensor() -> None:
    controller = plan(server_steps=1, a="small", b="small")
    state, result = run(devices(), controller, server_training=server_adding(10.0, 30))
    assert values(state) == pytest.approx([(10 * 1 + 20 * 2 + 30 * 10) / 60, 10])
    assert [p.rung for p in result.participants if p.client_id == SERVER_ID] == [""]


def test_examples_on_a_rung_that_is_trusted_less_count_less() -> None:
    rungs = {"large": LARGE, "small": replace(SMALL, trust=0.5)}
    controller = plan(server_steps=1, a="large", b="small", c="small")
    loop = federation(
        devices(), rungs=rungs, controller=controller, server_training=server_adding(10.0, 20)
    )
    state, result = loop.run_round(start(), None)
    shares = {"a": 10, "b": 20 * 0.5, "c": 30 * 0.5}
    wanted = {name: share / 35 * 60 / 80 for name, share in shares.items()} | {SERVER_ID: 20 / 80}
    assert {p.client_id: p.weight for p in result.participants} == pytest.approx(wanted)
    means = [wanted["a"] * 1 + wanted["b"] * 2 + wanted["c"] * 4 + wanted[SERVER_ID] * 10]
    means.append((wanted["a"] * 1 + wanted[SERVER_ID] * 10) / (wanted["a"] + wanted[SERVER_ID]))
    assert values(state) == pytest.approx(means)


def test_a_tensor_that_nobody_returned_stays_as_it_is_and_so_do_its_moments() -> None:
    state, _ = run(devices(), plan(b="small"), optimizer=ServerOptimizer("fedadam", 0.1))
    assert values(state)[0] > 0
    assert values(state)[1] == 0
    assert sorted(state.moments) == ["m/lora_A", "v/lora_A"]


def test_a_tensor_of_participants_without_weight_stays_as_it_is() -> None:
    controller = plan(server_steps=1, b="small")
    changes = {"server_training": server_adding(10.0), "server_weight_ratio": 0.0}
    state, _ = run(devices(), controller, **changes)
    assert values(state) == pytest.approx([2, 0])


def test_a_device_is_sent_the_tensors_of_its_rung_alone() -> None:
    transport = devices()
    run(transport, plan(a="large", b="small"))
    tasks = sent(transport, "train")
    assert {node: sorted(task.arrays) for node, task in tasks.items()} == {
        "a": ["lora_A", "lora_B"],
        "b": ["lora_A"],
    }


def test_an_update_with_the_names_of_another_rung_is_rejected() -> None:
    def whole_adapter(content: bytes) -> Any:
        task = decode(content)
        arrays = {**task.arrays, "lora_B": np.zeros(4, np.float32)}
        reply = FakeDevice(1, 10)
        payload = decode(reply_of(reply, content))
        return saying(Payload({**payload.arrays, **arrays}, payload.record))(content)

    def reply_of(device: FakeDevice, content: bytes) -> bytes:
        device.held.add(SMALL.sha256)
        return device.answer("train", content)

    _, result = run(devices({("train", "b"): whole_adapter}), plan(a="large", b="small"))
    assert [p.status for p in result.participants] == ["accepted", "rejected"]
    assert result.participants[1].reason == "tensors missing or unexpected: lora_B (1 in all)"


def test_only_parts_that_a_device_lacks_are_sent_and_their_bytes_are_told() -> None:
    transport = devices()
    transport.devices["a"].parts.add(short("1" * 64))
    _, result = run(transport, plan(a="large", b="large", c="small"))
    holds = sent(transport, "hold")
    assert {node: sorted(p.arrays) for node, p in holds.items()} == {
        "a": ["2" * 64],
        "b": ["1" * 64, "2" * 64],
        "c": ["1" * 64],
    }
    assert holds["a"].record["current"] == sorted(short(digit * 64) for digit in "12ab")
    lengths = {node: len(content) for k, node, content in transport.sent if k == "hold"}
    assert {p.client_id: p.bytes_emulator for p in result.participants} == lengths
    assert all(0 < p.bytes_emulator < p.bytes_down for p in result.participants)


def test_devices_in_the_same_case_are_sent_the_same_object() -> None:
    transport = devices()
    run(transport, plan(a="large", b="large", c="large"))
    messages = [content for kind, _, content in transport.sent if kind == "hold"]
    assert messages[0] is messages[1] is messages[2]


@pytest.mark.parametrize("parts", [None, "x", [3], ["x"] * 5000], ids=str)
def test_a_device_that_says_nonsense_of_its_parts_sits_out(parts: Any) -> None:
    record = {"num_examples": 10, "held": [], "emulator_parts": parts}
    transport = devices({("hello", "a"): saying(Payload(record=record))})
    _, result = run(transport, plan(b="small"))
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("'a' sits out: emulator_parts must ")


def test_what_a_device_kept_on_one_rung_is_of_no_use_on_another() -> None:
    lora = LoraAggregation("ffa")
    matrices = {"x.lora_A.weight": np.ones((2, 3), np.float32)}
    matrices |= {"x.lora_B.weight": np.ones((3, 2), np.float32)}
    other = {name.replace("x.", "y."): array for name, array in matrices.items()}
    small = Rung("a" * 64, {}, {"emulator": "a" * 64}, frozenset(matrices))
    rungs = {"large": Rung("b" * 64, {}, {"emulator": "b" * 64}), "small": small}
    state = start()
    state = type(state)(0, {**matrices, **other})
    kept = next(iter(lora.lasting_parts(matrices)))
    held = {"held": ["a" * 64, "b" * 64], "emulator_parts": [], "kept": kept}
    hello = saying(Payload(record={"num_examples": 10, **held}))
    for rung, left_out in (("small", kept), ("large", "")):
        transport = devices({("hello", "a"): hello})
        transport.devices["a"].held |= {"a" * 64, "b" * 64}
        loop = federation(transport, rungs=rungs, controller=plan(a=rung), lora=lora)
        loop.run_round(state, None)
        assert sent(transport, "train")["a"].record["left_out"] == left_out
