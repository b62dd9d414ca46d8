"""A device: what it answers, what it refuses, and what it shares with other devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError, EmulatorError, WireError
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.participant import (
    EmulatorShelf,
    Participant,
    fixed_width,
    hold_message,
    train_message,
)
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.tuning.local import LocalSettings
from tiny import random_text, tiny_model

KEPT, TUNED = [0, 2, 5], [0, 5]
CONFIG = AdapterConfig(num_bottom=1, num_top=1, r=2)
FLOAT = torch.float32


@pytest.fixture(scope="module")
def package() -> EmulatorPackage:
    model = tiny_model("llama", num_blocks=6)
    blocks = find_blocks(model)
    return pack_emulator(
        build_from_blocks(model, blocks, KEPT),
        model,
        blocks,
        KEPT,
        recipe="layer_drop:0.25",
        dtype=FLOAT,
        parent_sha256="0" * 64,
    )


@pytest.fixture(scope="module")
def hold(package: EmulatorPackage) -> bytes:
    return hold_message(package, CONFIG, TUNED)


@pytest.fixture(scope="module")
def adapter() -> dict[str, np.ndarray]:
    """Return an adapter of the full model, as the server has it."""
    model = tiny_model("llama", num_blocks=6)
    return attach(model, find_blocks(model), TUNED, CONFIG, seed=1).state()


def shelf() -> EmulatorShelf:
    return EmulatorShelf(torch.device("cpu"), FLOAT)


def device(name: str = "a", seed: int = 0, on: EmulatorShelf | None = None) -> Participant:
    return Participant(name, random_text(num_blocks=5, seed=seed), on or shelf())


def task(adapter: dict[str, np.ndarray], package: EmulatorPackage, **changes: Any) -> bytes:
    settings: dict[str, Any] = {
        "server_round": 3,
        "emulator": package.manifest.sha256,
        "num_steps": 2,
        "first_step": 4,
        "settings": LocalSettings(batch_size=2, learning_rate=0.01),
        "seed": 11,
    }
    return train_message(adapter, **{**settings, **changes})


def frozen_storages(on: EmulatorShelf, sha256: str) -> set[int]:
    """Return the addresses of the storages of all parameters that are not tuned."""
    model = on.get(sha256).model
    return {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}


# --- answers ------------------------------------------------------------------------------------


def test_hello_says_what_the_device_has() -> None:
    assert decode(device("site-1").handle("hello", encode(Payload()))).record == {
        "client_id": "site-1",
        "num_examples": 5,
        "num_tokens": 5 * 16,
        "held": [],
    }


def test_hold_is_answered_with_the_emulators_hash(package: EmulatorPackage, hold: bytes) -> None:
    one = device()
    reply = decode(one.handle("hold", hold))
    assert reply.record == {"held": package.manifest.sha256}
    assert one.held == [package.manifest.sha256]
    assert decode(one.handle("hello", encode(Payload()))).record["held"] == one.held


def test_train_is_answered_with_a_changed_adapter_and_its_losses(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    reply = decode(one.handle("train", task(adapter, package)))
    assert {k: reply.record[k] for k in ("server_round", "emulator", "num_examples")} == {
        "server_round": 3,
        "emulator": package.manifest.sha256,
        "num_examples": 5,
    }
    assert reply.record["num_tokens"] == 2 * 2 * 16
    first, last, mean = (reply.record[k] for k in ("first_loss", "last_loss", "mean_loss"))
    assert mean == pytest.approx((first + last) / 2)
    assert any((reply.arrays[n] != adapter[n]).any() for n in adapter)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "00000.000000"), (12.3456784, "00012.345678"), (1e9, "99999.000000")],
)
def test_durations_have_one_length_so_that_bytes_do_not_depend_on_speed(
    seconds: float, text: str
) -> None:
    assert fixed_width(seconds) == text


def test_update_has_the_adapters_tensors_and_no_frozen_one(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    reply = decode(one.handle("train", task(adapter, package)))
    shapes = {n: (a.shape, a.dtype) for n, a in reply.arrays.items()}
    assert shapes == {n: (a.shape, a.dtype) for n, a in adapter.items()}
    assert all(".lora_" in name for name in reply.arrays)


def test_frozen_weights_are_the_same_before_and_after_training(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    on = shelf()
    one = device(on=on)
    one.handle("hold", hold)
    model = on.get(package.manifest.sha256).model
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    one.handle("train", task(adapter, package))
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_an_update_does_not_depend_on_who_trained_before_on_the_same_shelf(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    alone = device("b", seed=1)
    alone.handle("hold", hold)
    want = decode(alone.handle("train", task(adapter, package))).arrays

    on = shelf()
    first, second = device("a", seed=0, on=on), device("b", seed=1, on=on)
    first.handle("hold", hold)
    second.handle("hold", hold)
    first.handle("train", task(adapter, package, num_steps=5))
    got = decode(second.handle("train", task(adapter, package))).arrays
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in want.items()}


# --- one copy of the frozen weights (invariant 4) -------------------------------------------------


def test_devices_of_one_shelf_share_the_frozen_storages(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    on = shelf()
    sha256 = package.manifest.sha256
    counts, storages = [], []
    for number in range(8):
        one = device(f"d{number}", seed=number, on=on)
        one.handle("hold", hold)
        one.handle("train", task(adapter, package, num_steps=1))
        storages.append(frozen_storages(on, sha256))
        counts.append(len(storages[-1]))
    assert len(set(counts)) == 1
    assert counts[0] > 0
    assert all(s == storages[0] for s in storages)


def test_two_shelves_hold_equal_frozen_weights(package: EmulatorPackage, hold: bytes) -> None:
    models = []
    for _ in range(2):
        torch.rand(3)  # another random state must make no difference
        on = shelf()
        device(on=on).handle("hold", hold)
        models.append(on.get(package.manifest.sha256).model)
    one, other = ({n: p for n, p in m.named_parameters() if not p.requires_grad} for m in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(p, other[n]) for n, p in one.items())
    assert all(p.data_ptr() != other[n].data_ptr() for n, p in one.items())


# --- refusals -------------------------------------------------------------------------------------


def test_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(WireError, match="must be one of hello, hold, train, got 'evaluate'"):
        device().handle("evaluate", encode(Payload()))


@pytest.mark.parametrize("kind", ["hello", "hold", "train"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100], ids=["empty", "junk", "ff"])
def test_what_is_no_message_is_refused(kind: str, content: bytes) -> None:
    with pytest.raises(WireError, match="not a fedpeat message"):
        device().handle(kind, content)


def test_training_without_holding_is_refused_even_if_a_neighbour_holds(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    on = shelf()
    device("a", on=on).handle("hold", hold)
    with pytest.raises(EmulatorError, match="b does not hold emulator"):
        device("b", on=on).handle("train", task(adapter, package))


def test_restore_needs_the_emulator_on_the_shelf(package: EmulatorPackage, hold: bytes) -> None:
    on = shelf()
    one, other = device("a", on=on), device("b")
    one.handle("hold", hold)
    again = device("a", on=on)
    again.restore(one.held)
    assert again.held == one.held
    with pytest.raises(EmulatorError, match="ask for it with a hold message"):
        other.restore(one.held)
    assert other.held == []


def change_weights(payload: Payload) -> Payload:
    weights = payload.arrays["weights"].copy()
    weights[-1] ^= 1
    return Payload({"weights": weights}, payload.record)


def change_record(**changes: Any) -> Callable[[Payload], Payload]:
    def change(payload: Payload) -> Payload:
        record = {**payload.record, **changes}
        return Payload(payload.arrays, {k: v for k, v in record.items() if v is not ...})

    return change


def change_config(payload: Payload) -> Payload:
    config = {**payload.record["config"], "rms_norm_eps": 0.1}
    return Payload(payload.arrays, {**payload.record, "config": config})


DAMAGES: dict[str, tuple[Callable[[Payload], Payload], str]] = {
    "one bit of the weights": (change_weights, "emulator is damaged: its hash must be"),
    "weights cut short": (
        lambda p: Payload({"weights": p.arrays["weights"][:-8]}, p.record),
        "emulator is damaged",
    ),
    "no weights": (lambda p: Payload({}, p.record), "not an emulator"),
    "a changed configuration": (change_config, "emulator is damaged"),
    "no manifest": (change_record(manifest=...), "not an emulator"),
    "manifest is text": (change_record(manifest="x"), "not an emulator"),
    "no adapter": (change_record(adapter=...), "no usable adapter settings: KeyError"),
    "adapter is a number": (change_record(adapter=3), "no usable adapter settings"),
    "adapter of another version": (
        change_record(adapter={"target_modules": [], "rank": 4}),
        "no usable adapter settings: TypeError",
    ),
    "adapter out of range": (
        change_record(adapter={"target_modules": [], "r": 0}),
        "no usable adapter settings: .*adapter.r must be at least 1",
    ),
    "no tuned blocks": (change_record(tuned_blocks=...), "no usable adapter settings"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_emulator_is_refused_and_not_held(name: str, hold: bytes) -> None:
    damage, reason = DAMAGES[name]
    one = device()
    with pytest.raises(EmulatorError, match=reason):
        one.handle("hold", encode(damage(decode(hold))))
    assert one.held == []


TASK_DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "no emulator": ({"emulator": ...}, "not a train task: KeyError"),
    "emulator is a number": ({"emulator": 5}, "emulator must be a hash, got 5"),
    "no settings": ({"settings": ...}, "not a train task: KeyError"),
    "settings is text": ({"settings": "fast"}, "not a train task: TypeError"),
    "settings of another version": ({"settings": {"lr": 1}}, "not a train task: TypeError"),
    "an entry too many": ({"priority": 1}, "not a train task: TypeError"),
    "steps as text": ({"num_steps": "2"}, "numbers of a train task must be whole"),
    "steps True": ({"num_steps": True}, "numbers of a train task must be whole"),
    "half a step": ({"num_steps": 0.5}, "numbers of a train task must be whole"),
    "negative steps": ({"first_step": -1}, "numbers of a train task must be whole"),
}


@pytest.mark.parametrize("name", TASK_DAMAGES)
def test_a_train_task_that_is_none_is_refused(
    name: str, package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    changes, reason = TASK_DAMAGES[name]
    one = device()
    one.handle("hold", hold)
    content = encode(change_record(**changes)(decode(task(adapter, package))))
    with pytest.raises(WireError, match=reason):
        one.handle("train", content)


def test_a_task_damaged_on_the_way_is_refused(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    content = task(adapter, package)
    for cut in (len(content) - 1, len(content) // 2, 9):
        with pytest.raises(WireError, match="not a fedpeat message"):
            one.handle("train", content[:cut])


def without_first(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(itertools.islice(adapter.items(), 1, None))


def renamed(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("layers.5.", "layers.4."): a for name, a in adapter.items()}


def of_rank_one(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a[:1] for name, a in adapter.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_first, "adapter lacks 1 of"),
        (renamed, "adapter lacks"),
        (of_rank_one, "must have shape"),
        (lambda _: {}, "adapter lacks"),
        (lambda a: {**a, "lm_head.weight": np.zeros(1, np.float32)}, "has unexpected 1"),
    ],
    ids=["missing", "another block's", "another rank's", "empty", "unexpected"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    reason: str,
    package: EmulatorPackage,
    hold: bytes,
    adapter: dict[str, np.ndarray],
) -> None:
    one = device()
    one.handle("hold", hold)
    with pytest.raises(AdapterError, match=reason):
        one.handle("train", task(change(adapter), package))


def test_behind_a_transport_refusals_are_replies_with_the_reason(
    package: EmulatorPackage, adapter: dict[str, np.ndarray]
) -> None:
    transport = InProcessTransport({"a": device().handle})
    tickets = transport.submit("train", {"a": task(adapter, package)}, None)
    ((_, reply),) = transport.poll(tickets)
    assert reply.content is None
    assert reply.error.startswith("EmulatorError: a does not hold emulator")
