"""The round loop where devices mask their updates: the sum enters as one participant would."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fakes import (
    RUNG,
    FakeClock,
    FakeDevice,
    FakeTransport,
    PlanOf,
    adapter,
    everyone,
    failing,
    federation,
    saying,
    server_adding,
    start,
    update_of,
)
from fedpeat.adapter.lora import part_of
from fedpeat.core.errors import AggregationError, WireError
from fedpeat.core.records import ClientPlan, Reply, RoundPlan, RoundResult
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated import exchange
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.participant import Participant
from fedpeat.federated.rounds import FederationState
from fedpeat.federated.secagg.device import SecureDevice
from fedpeat.federated.secagg.identity import Authority
from fedpeat.federated.secagg.round import SecureAggregation
from fedpeat.federated.secagg.terms import SECURE_KEY, work_digest
from fedpeat.federated.shelf import EmulatorShelf
from secure_cohort import identities
from tiny import random_text

ROUNDED = 1e-6


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(exchange, "time", clock)
    return clock


@dataclass
class MaskedDevice(FakeDevice):
    """Adds ``delta`` as well, and masks it."""

    secure: SecureDevice | None = None

    def answer(self, kind: str, content: bytes) -> bytes:
        assert self.secure is not None
        if kind in self.secure.kinds:
            return encode(self.secure.kinds[kind](decode(content)))
        if kind == "hello":
            hello = decode(super().answer(kind, content)).record
            kept = {k: v for k, v in hello.items() if k != "num_examples"}
            return encode(Payload(record={**kept, "secure": True}))
        if kind == "hold":
            return super().answer(kind, content)
        task = decode(content)
        record = task.record
        tuned = part_of(task.arrays, record["tuned"])
        self.secure.begin(
            record[SECURE_KEY],
            task.arrays,
            record["server_round"],
            record["emulator"],
            work_digest(record),
        )
        update = update_of(Payload(tuned), self.delta).arrays
        masked = self.secure.masked(tuned, update, self.num_examples, 100, self.delta)
        told = {k: record[k] for k in ("server_round", "emulator")}
        return encode(Payload(masked.arrays, {**masked.record, **told, "seconds": "00000.100000"}))


def masked(*deltas: float) -> FakeTransport:
    """Return devices d00, d01, ... that add and weigh as told: 10, 20, ... examples."""
    own, _ = identities(len(deltas))
    return FakeTransport(
        {
            name: MaskedDevice(delta, 10 * (place + 1), secure=SecureDevice(identity, 3))
            for place, ((name, identity), delta) in enumerate(zip(own.items(), deltas, strict=True))
        }
    )


def secure(transport: FakeTransport, **changes: Any) -> SecureAggregation:
    _, authority = identities(len(transport.devices))
    plain = SecureAggregation(Authority(authority), 0.6, None, 3, 8.0, 24, 1000)
    return replace(plain, **changes)


def one_round(transport: FakeTransport, **changes: Any) -> tuple[FederationState, RoundResult]:
    settings = {"secure": secure(transport), **changes}
    return federation(transport, **settings).run_round(start(), None)


def values_of(state: FederationState) -> np.ndarray:
    return np.concatenate([a.reshape(-1) for a in state.adapter.values()])


def test_a_round_averages_by_examples_that_nobody_told() -> None:
    state, result = one_round(masked(1, 2, 4))
    np.testing.assert_allclose(values_of(state), (10 + 40 + 120) / 60, atol=ROUNDED)
    assert {r.status for r in result.participants} == {"accepted"}
    assert {r.num_examples for r in result.participants} == {0}
    assert result.num_tokens == 300
    assert result.train_loss == pytest.approx(7 / 3, abs=1e-4)
    assert (result.warnings, result.product_error) == ((), None)
    assert state.last_losses == {}


@pytest.mark.parametrize(
    ("ratio", "mean"), [(None, (170 + 140 * -1) / 200), (0.25, 0.75 * 170 / 60 - 0.25)]
)
def test_the_server_enters_in_clear_with_its_share(ratio: float | None, mean: float) -> None:
    state, result = one_round(
        masked(1, 2, 4),
        controller=everyone(server_steps=1),
        server_training=server_adding(-1, num_examples=140),
        server_weight_ratio=ratio,
    )
    np.testing.assert_allclose(values_of(state), mean, atol=ROUNDED)
    server = result.participants[-1]
    assert (server.client_id, server.num_examples) == ("server", 140)
    assert server.weight == pytest.approx(0.7 if ratio is None else 0.25)
    assert result.num_tokens == 400
    assert result.train_loss == pytest.approx((1 + 2 + 4 + 2.5) / 4, abs=1e-4)


def test_server_optimizers_and_frozen_factors_work_on_the_sum() -> None:
    lora = {f"q.{name}.weight": array for name, array in adapter().items()}
    transport = masked(1, 2, 4)
    changes = {"lora": LoraAggregation("ffa"), "optimizer": ServerOptimizer("fedavgm", 0.5)}
    loop = federation(transport, secure=secure(transport), **changes)
    state, _ = loop.run_round(FederationState(0, lora), None)
    np.testing.assert_allclose(state.adapter["q.lora_B.weight"], 0.5 * 170 / 60, atol=ROUNDED)
    np.testing.assert_array_equal(state.adapter["q.lora_A.weight"], lora["q.lora_A.weight"])
    assert list(state.moments) == ["m/q.lora_B.weight"]


def test_nobody_can_tell_what_averaging_factors_does_wrong_in_a_sum() -> None:
    pair = {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)}
    begin = FederationState(0, {name: np.zeros(shape, np.float32) for name, shape in pair.items()})
    changes = {"controller": everyone(server_steps=1), "server_training": server_adding(-1)}
    in_clear = federation(FakeTransport({"d00": FakeDevice(2)}), **changes)
    assert in_clear.run_round(begin, None)[1].product_error is not None
    transport = masked(1, 2, 4)
    summed = federation(transport, secure=secure(transport), **changes)
    assert summed.run_round(begin, None)[1].product_error is None


def test_a_device_lost_in_training_is_left_out_of_sum_and_names_its_reason() -> None:
    transport = masked(1, 2, 4, 100)
    transport.scripts["train", "d03"] = failing("battery", lost=True)
    state, result = one_round(transport)
    np.testing.assert_allclose(values_of(state), (10 + 40 + 120) / 60, atol=ROUNDED)
    gone = result.participants[-1]
    assert (gone.client_id, gone.status, gone.reason) == ("d03", "dropped", "battery")


def test_below_the_threshold_the_adapter_stays_whatever_the_server_made() -> None:
    transport = masked(1, 2, 4, 8)
    for name in ("d02", "d03"):
        transport.scripts["train", name] = failing("battery", lost=True)
    state, result = one_round(
        transport, controller=everyone(server_steps=1), server_training=server_adding(5)
    )
    np.testing.assert_array_equal(values_of(state), 0)
    assert state.num_barren_rounds == 1
    told = "secure aggregation: too few devices sent updates: 2, 3 wanted"
    assert told in result.warnings
    assert result.warnings[-1].startswith("the adapter stays as it was: 0 updates accepted")
    assert told in result.warnings[-1]


def test_with_too_few_at_the_start_nobody_trains() -> None:
    transport = masked(1, 2, 4)
    transport.scripts["hold", "d00"] = failing("disk full")
    trained: list[int] = []

    def training(*task: Any) -> Payload:
        trained.append(1)
        return server_adding(5)(*task)

    server = everyone(server_steps=1)
    _, result = one_round(transport, controller=server, server_training=training)
    assert [kind for kind, _, _ in transport.sent if kind == "train"] == []
    assert trained == []
    assert "secure aggregation: too few devices sent keys: 2, 3 wanted" in result.warnings
    assert [(r.status, r.reason) for r in result.participants] == [
        ("failed", "disk full"),
        ("dropped", "not asked to train: too few devices are left to hide it"),
        ("dropped", "not asked to train: too few devices are left to hide it"),
    ]


def test_fewest_updates_of_a_round_count_devices_not_sums() -> None:
    state, _ = one_round(masked(1, 2, 4), min_clients=3)
    assert state.num_barren_rounds == 0
    state, result = one_round(masked(1, 2, 4), min_clients=4)
    assert state.num_barren_rounds == 1
    assert "3 updates accepted, 4 wanted" in result.warnings[-1]


def test_values_clipped_on_devices_are_counted_in_a_warning() -> None:
    transport = masked(1, 2, 4)
    _, result = one_round(transport, secure=secure(transport, clip_range=3.0))
    assert result.warnings == (
        "10 values of the devices' changes were beyond federated.secure_clip_range and were "
        "clipped",
    )


def test_every_byte_of_the_protocol_is_counted() -> None:
    transport = masked(1, 2, 4)
    _, result = one_round(transport)
    assert result.bytes_down == sum(len(content) for _, _, content in transport.sent)
    assert result.bytes_up == sum(len(content) for _, _, content in transport.received)
    assert len({kind for kind, _, _ in transport.sent}) == 7


@pytest.mark.parametrize("masks", [True, False])
def test_a_device_and_a_run_that_disagree_on_masking_are_told_so(masks: bool) -> None:  # noqa: FBT001
    transport = masked(1, 2, 4)
    record = {"num_examples": 5, "held": [], "emulator_parts": []}
    if masks:
        transport.scripts["hello", "d00"] = saying(Payload(record=record))
    _, result = one_round(transport, **({} if masks else {"secure": None}))
    own, others = ("true", "false") if masks else ("false", "true")
    assert result.warnings[0] == (
        f"'d00' sits out: federated.secure_aggregation must be as here, {own}, on the device, "
        f"got {others}"
    )


def test_devices_with_other_tensors_than_others_are_not_summed_up() -> None:
    part = replace(RUNG, sha256="d" * 64, tensors=frozenset(["lora_A"]))
    plan = PlanOf(
        lambda seen: RoundPlan(
            tuple(
                ClientPlan(c.client_id, "part" if c.client_id == "d00" else "emulator", 1)
                for c in seen.clients
            ),
            0,
        )
    )
    with pytest.raises(AggregationError, match="needs devices that tune the same tensors"):
        one_round(masked(1, 2, 4), controller=plan, rungs={"emulator": RUNG, "part": part})


def test_devices_with_other_steps_than_others_are_not_summed_up() -> None:
    plan = PlanOf(
        lambda seen: RoundPlan(
            tuple(
                ClientPlan(c.client_id, "emulator", 1 + place)
                for place, c in enumerate(seen.clients)
            ),
            0,
        )
    )
    with pytest.raises(AggregationError, match="as many steps as others, got \\[1, 2, 3\\]"):
        one_round(masked(1, 2, 4), controller=plan)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_steps", 1), ("first_step", 7), ("tuned", "lora_B"), ("rank", 1), ("settings", {})],
)
def test_another_task_than_that_of_all_is_not_trained(key: str, value: object) -> None:
    transport = masked(1, 2, 4)
    reasons: list[str] = []

    def other(content: bytes) -> Reply:
        task = decode(content)
        record = {**task.record, key: value}
        try:
            return Reply(
                "d00",
                transport.devices["d00"].answer("train", encode(Payload(task.arrays, record))),
            )
        except WireError as error:
            reasons.append(str(error))
            return Reply("d00", error=str(error))

    transport.scripts["train", "d00"] = other
    one_round(transport)
    assert reasons == ["round, adapter or settings are not those of the round's terms"]


# --- participants ---------------------------------------------------------------------------------


def participant(side: SecureDevice | None) -> Participant:
    shelf = EmulatorShelf.__new__(EmulatorShelf)  # nothing is held
    return Participant("d00", random_text(), shelf, side)


def test_a_device_that_masks_says_nothing_of_its_data() -> None:
    own, _ = identities(3)
    hello = encode(Payload())
    secret = decode(participant(SecureDevice(own["d00"], 3)).handle("hello", hello)).record
    assert secret == {"client_id": "d00", "held": [], "emulator_parts": [], "secure": True}
    assert decode(participant(None).handle("hello", hello)).record["num_examples"] == 8


def test_a_device_that_does_not_mask_says_so_when_it_is_asked_to() -> None:
    with pytest.raises(WireError, match="both sides must set it"):
        participant(None).handle("secagg_keys", encode(Payload()))
