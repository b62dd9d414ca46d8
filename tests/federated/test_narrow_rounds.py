"""Devices with fewer rows and columns in one round: who is sent what, and what is averaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fakes import FakeDevice, FakeTransport, PlanOf, federation, saying, server_adding, start
from fedpeat.adapter.slices import Slice
from fedpeat.core.records import ClientPlan, RoundPlan
from fedpeat.core.wire import Payload, decode
from fedpeat.federated.aggregation import ServerOptimizer
from fedpeat.federated.robust import Defence
from fedpeat.federated.shelf import Rung

PARTS = {"1" * 64: b"common" * 30}
SLICES = {"lora_A": Slice(1, np.array([1])), "lora_B": Slice(0, np.array([0, 3]))}
OTHER = {"lora_B": Slice(0, np.array([0, 1]))}
RUNGS = {
    "wide": Rung("b" * 64, PARTS, {"emulator": "b" * 64}),
    "narrow": Rung("a" * 64, PARTS, {"emulator": "a" * 64}, slices=SLICES),
    "other": Rung("c" * 64, PARTS, {"emulator": "c" * 64}, slices=OTHER),
}
RECORD = {
    "server_round": 1, "emulator": "a" * 64, "num_examples": 20, "first_loss": 3.0,
    "last_loss": 2.0, "mean_loss": 2.5, "num_tokens": 100, "seconds": "00000.100000",
}  # fmt: skip


def devices(scripts: Any = None) -> FakeTransport:
    """Return devices a, b, c that add 1, 2, 4 and weigh 10, 20, 30."""
    three = {"a": FakeDevice(1, 10), "b": FakeDevice(2, 20), "c": FakeDevice(4, 30)}
    return FakeTransport(three, scripts)


def run(transport: FakeTransport, state: Any = None, *, steps: int = 0, **changes: Any) -> Any:
    rungs = {c: changes.pop(c) for c in "abc" if c in changes}
    cohort = tuple(ClientPlan(name, rung, 2) for name, rung in rungs.items())
    controller = PlanOf(lambda _: RoundPlan(cohort, steps))
    loop = federation(transport, rungs=RUNGS, controller=controller, **changes)
    return loop.run_round(start() if state is None else state, None)


def test_a_device_is_sent_its_entries_alone() -> None:
    transport = devices()
    run(transport, a="wide", b="narrow")
    sent = {node: decode(c).arrays for kind, node, c in transport.sent if kind == "train"}
    assert {n: a.shape for n, a in sent["a"].items()} == {"lora_A": (2, 3), "lora_B": (4,)}
    assert {n: a.shape for n, a in sent["b"].items()} == {"lora_A": (2, 1), "lora_B": (2,)}


def test_an_entry_is_averaged_over_those_who_have_it() -> None:
    state, result = run(devices(), a="wide", b="narrow", c="other")
    alone, all_three = 1, (10 * 1 + 20 * 2 + 30 * 4) / 60
    first, last = (10 * 1 + 30 * 4) / 40, (10 * 1 + 20 * 2) / 30
    np.testing.assert_allclose(state.adapter["lora_B"], [all_three, first, alone, last])
    np.testing.assert_allclose(state.adapter["lora_A"], [[first, all_three, first]] * 2)
    assert [p.status for p in result.participants] == ["accepted"] * 3


def test_a_robust_rule_is_applied_to_an_entry_among_those_who_have_it() -> None:
    defence = Defence("median", attackers_ratio=0.0)
    state, result = run(devices(), a="wide", b="narrow", c="other", defence=defence)
    np.testing.assert_allclose(state.adapter["lora_B"], [2, 2.5, 1, 1.5])
    np.testing.assert_allclose(state.adapter["lora_A"], [[2.5, 2, 2.5]] * 2)
    assert result.warnings == ()


def test_an_entry_that_too_few_have_for_a_robust_rule_stays_as_it_is() -> None:
    state, result = run(devices(), a="wide", b="narrow", c="other", defence=Defence("median"))
    np.testing.assert_allclose(state.adapter["lora_B"], [2, 0, 0, 0])
    np.testing.assert_allclose(state.adapter["lora_A"], [[0, 2, 0]] * 2)
    assert result.warnings == (
        "4 pieces of the adapter take nothing from devices: median against 1 of 2 needs at least 3",
    )
    assert sum(p.weight for p in result.participants) == pytest.approx(3 / 10)


def test_the_server_has_every_entry() -> None:
    state, _ = run(devices(), b="narrow", steps=1, server_training=server_adding(10.0, 30))
    both = (20 * 2 + 30 * 10) / 50
    np.testing.assert_allclose(state.adapter["lora_B"], [both, 10, 10, both])
    np.testing.assert_allclose(state.adapter["lora_A"], [[10, both, 10]] * 2)


@pytest.mark.parametrize("rule", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_entries_that_nobody_has_stay_as_they_are_whatever_moved_them_before(rule: str) -> None:
    optimizer = ServerOptimizer(rule, 0.1)
    before, _ = run(devices(), a="wide", optimizer=optimizer)
    after, _ = run(devices(), before, b="narrow", optimizer=optimizer)
    old, new = before.adapter, after.adapter
    np.testing.assert_array_equal(new["lora_B"][[1, 2]], old["lora_B"][[1, 2]])
    np.testing.assert_array_equal(new["lora_A"][:, [0, 2]], old["lora_A"][:, [0, 2]])
    assert (new["lora_B"][[0, 3]] > old["lora_B"][[0, 3]]).all()
    assert (old["lora_B"] > 0).all()


def test_entries_that_a_round_left_alone_keep_their_moments() -> None:
    optimizer = ServerOptimizer("fedadam", 0.1)
    first, _ = run(devices(), a="wide", optimizer=optimizer)
    narrow, _ = run(devices(), first, b="narrow", optimizer=optimizer)
    again, _ = run(devices(), narrow, a="wide", optimizer=optimizer)
    twice, _ = run(devices(), first, a="wide", optimizer=optimizer)
    np.testing.assert_array_equal(again.adapter["lora_B"][1], twice.adapter["lora_B"][1])
    assert again.adapter["lora_B"][0] != twice.adapter["lora_B"][0]


def test_an_update_of_the_full_shape_is_refused_from_a_narrow_device() -> None:
    arrays = {"lora_A": np.ones((2, 3), np.float32), "lora_B": np.ones(4, np.float32)}
    state, result = run(
        devices({("train", "b"): saying(Payload(arrays, RECORD))}), a="wide", b="narrow"
    )
    assert result.participants[1].status == "rejected"
    assert "lora_A must be float32 (2, 1), got float32 (2, 3)" in result.participants[1].reason
    np.testing.assert_array_equal(state.adapter["lora_B"], np.ones(4))
