"""A device: what it answers, what it refuses, and what it shares with other devices."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.adapter.lora import Part, part_of, truncated
from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError, EmulatorError, WireError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.wire import Payload, decode, digest, encode
from fedpeat.data.examples import Examples
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.emulator.parts import part_bytes, part_hash, read_part
from fedpeat.federated.codecs import UpdateCodec, decode_update
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.participant import Participant, fixed_width, train_message
from fedpeat.federated.shelf import EmulatorShelf, Rung, hashes_of
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.local import LocalSettings
from tiny import BLOCK_SIZE, random_text, tiny_model, tiny_package

KEPT, TUNED = [0, 2, 5], [0, 5]
CONFIG = AdapterConfig(num_bottom=1, num_top=1, r=2)
FLOAT = torch.float32


@pytest.fixture(scope="module")
def package() -> EmulatorPackage:
    return tiny_package(KEPT)


@pytest.fixture(scope="module")
def hold(package: EmulatorPackage) -> bytes:
    rung = Rung.of(package, CONFIG, TUNED)
    return rung.hold_message(rung.parts, hashes_of([rung]))


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
        "emulator_parts": [],
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


_TEXT, _NO_PROMPT = random_text(num_blocks=5), np.arange(BLOCK_SIZE) >= 2
PROMPTED = replace(_TEXT, loss_mask=_TEXT.loss_mask & _NO_PROMPT)
OTHER_PROMPT = replace(PROMPTED, input_ids=np.where(_NO_PROMPT, _TEXT.input_ids, 1))
HIDING = LocalSettings(batch_size=2, learning_rate=0.01, noise_multiplier=1e6)


def noisy_update(
    package: EmulatorPackage,
    hold: bytes,
    adapter: dict[str, np.ndarray],
    data: Examples | None = None,
    **changes: Any,
) -> np.ndarray:
    """Return how a device with some key moves the adapter in one step that is all noise."""
    data = data or PROMPTED
    one = Participant("a", data, shelf(), noise=NoiseSource(bytes(32)))
    one.handle("hold", hold)
    changes = {"settings": HIDING, "num_steps": 1, **changes}
    update = decode(one.handle("train", task(adapter, package, **changes))).arrays
    return np.concatenate([(update[n] - adapter[n]).ravel() for n in sorted(adapter)])


def test_the_same_task_on_the_same_data_gets_the_same_noise_and_no_other_does(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    update = noisy_update(package, hold, adapter)
    assert noisy_update(package, hold, adapter).tobytes() == update.tobytes()
    moved = {name: array + np.float32(1e-3) for name, array in adapter.items()}
    others = [
        noisy_update(package, hold, moved),
        noisy_update(package, hold, adapter, server_round=4),
        noisy_update(package, hold, adapter, settings=replace(HIDING, example_clip_norm=0.99)),
        noisy_update(package, hold, adapter, OTHER_PROMPT),
        noisy_update(package, hold, adapter, _TEXT),
    ]
    for other in others:  # a step of Adam goes along the signs of the noise
        assert abs(np.corrcoef(update, other)[0, 1]) < 0.2


def test_a_device_that_is_given_no_key_has_one_of_its_own(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    answers = []
    for _ in range(2):
        one = device()
        one.handle("hold", hold)
        answers.append(one.handle("train", task(adapter, package, settings=HIDING)))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.99, -1.0, float("nan")])
def test_a_device_tunes_with_no_less_noise_than_it_wants(
    noise_multiplier: float, package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = Participant("a", random_text(num_blocks=5), shelf(), least_noise=1.0)
    one.handle("hold", hold)
    content = task(adapter, package, settings=replace(HIDING, noise_multiplier=1.0))
    one.handle("train", content)
    record = decode(content).record
    settings = {**record["settings"], "noise_multiplier": noise_multiplier}
    payload = Payload(decode(content).arrays, {**record, "settings": settings})
    with pytest.raises((AdapterError, WireError), match="noise_multiplier"):
        one._train(payload)  # noqa: SLF001 - NaN does not come over the wire


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


# --- parts of the adapter -------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", ["lora_A", "lora_B"])
def test_a_part_is_tuned_and_sent_back_alone(
    tuned: Part, package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    started = {n: a + np.float32(0.01) for n, a in adapter.items()}
    reply = decode(one.handle("train", task(started, package, tuned=tuned)))
    assert reply.arrays.keys() == part_of(adapter, tuned).keys()
    assert all((a != started[n]).any() for n, a in reply.arrays.items())


def test_with_one_factor_frozen_the_other_is_tuned_as_if_that_were_part_of_the_model(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    # The first gradient of A is zero, since B starts at zero: one step moves B alone either way.
    # Weight decay and clipping, were they to see the frozen A, would show.
    settings = LocalSettings(2, 0.01, weight_decay=0.1, max_grad_norm=0.01, proximal_mu=0.1)
    updates = []
    for tuned in ("all", "lora_B"):
        one = device()
        one.handle("hold", hold)
        content = task(adapter, package, tuned=tuned, num_steps=1, settings=settings)
        updates.append(part_of(decode(one.handle("train", content)).arrays, "lora_B"))
    assert {n: a.tobytes() for n, a in updates[0].items()} == {
        n: a.tobytes() for n, a in updates[1].items()
    }


def assert_same_arrays(got: bytes, want: bytes) -> None:
    one, other = ({n: a.tobytes() for n, a in decode(c).arrays.items()} for c in (got, want))
    assert one == other


def asked(one: Participant, *parts: str) -> Any:
    reply = one.handle("hello", encode(Payload(record={"parts": list(parts)})))
    return decode(reply).record.get("kept")


def test_what_a_task_froze_is_kept_and_need_not_be_sent_again(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one, other = device(), device()
    for participant in (one, other):
        participant.handle("hold", hold)
    frozen, tuned = part_of(adapter, "lora_A"), part_of(adapter, "lora_B")
    sha256 = digest(frozen)
    assert asked(one, sha256) is None
    want = one.handle("train", task(adapter, package, tuned="lora_B"))
    assert asked(one, digest(tuned), sha256) == one.kept == sha256
    assert asked(one, digest(tuned)) is None
    again = one.handle("train", task(tuned, package, tuned="lora_B", left_out=sha256))
    assert_same_arrays(again, want)
    assert_same_arrays(other.handle("train", task(adapter, package, tuned="lora_B")), want)


def test_the_part_that_was_frozen_can_be_tuned_next_without_being_sent(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    one.handle("train", task(adapter, package, tuned="lora_B"))
    new_b = {n: a + np.float32(0.01) for n, a in part_of(adapter, "lora_B").items()}
    content = task(new_b, package, tuned="lora_A", left_out=one.kept)
    reply = decode(one.handle("train", content))
    assert reply.arrays.keys() == part_of(adapter, "lora_A").keys()
    assert one.kept == digest(new_b)


def test_after_a_task_without_a_frozen_part_nothing_is_kept(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    one.handle("train", task(adapter, package, tuned="lora_B"))
    one.handle("train", task(adapter, package))
    assert one.kept == ""


def test_leaving_out_what_a_device_has_not_kept_is_refused(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    one = device()
    one.handle("hold", hold)
    one.handle("train", task(adapter, package, tuned="lora_A"))
    content = task(part_of(adapter, "lora_B"), package, tuned="lora_B", left_out="c0ffee" * 9)
    with pytest.raises(AdapterError, match="a has not kept part c0ffeec0ffee of the adapter"):
        one.handle("train", content)


def test_restored_parts_are_kept_again(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    on = shelf()
    one, again = device("a", on=on), device("a", on=on)
    one.handle("hold", hold)
    again.restore(one.inventory(), part_of(adapter, "lora_A"))
    content = task(part_of(adapter, "lora_B"), package, tuned="lora_B", left_out=again.kept)
    assert decode(again.handle("train", content)).arrays.keys() == part_of(adapter, "lora_B").keys()


def test_a_device_tunes_at_the_rank_that_it_is_told_and_leaves_none_behind(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    on = shelf()
    small, large, alone = device("a", on=on), device("b", on=on), device("b")
    for one in (small, large, alone):
        one.handle("hold", hold)
    cut = truncated(adapter, 1)
    reply = decode(small.handle("train", task(cut, package, rank=1)))
    assert {n: a.shape for n, a in reply.arrays.items()} == {n: a.shape for n, a in cut.items()}
    want = alone.handle("train", task(adapter, package))
    assert_same_arrays(large.handle("train", task(adapter, package)), want)


def test_tuning_at_a_lower_rank_is_tuning_factors_that_are_zero_beyond_it(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    rng = np.random.default_rng(0)
    start = truncated(
        {n: (a + rng.normal(0, 0.1, a.shape)).astype(a.dtype) for n, a in adapter.items()}, 1
    )
    filled = {}
    for name, array in start.items():
        filled[name] = np.zeros_like(adapter[name])
        filled[name][: array.shape[0], : array.shape[1]] = array
    updates = []
    for content in (task(start, package, rank=1), task(filled, package)):
        one = device()
        one.handle("hold", hold)
        updates.append(decode(one.handle("train", content)).arrays)
    for name, array in updates[0].items():
        rows, columns = array.shape
        np.testing.assert_allclose(updates[1][name][:rows, :columns], array, atol=1e-5)


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


def test_a_restored_device_holds_again_what_it_held(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    on = shelf()
    one, again, elsewhere = device("a", on=on), device("a", on=on), device("a")
    one.handle("hold", hold)
    for restored in (again, elsewhere):
        restored.restore(one.inventory(), {})
        hello = encode(Payload())
        assert restored.handle("hello", hello) == one.handle("hello", hello)
    assert_same_arrays(
        again.handle("train", task(adapter, package)), one.handle("train", task(adapter, package))
    )
    with pytest.raises(EmulatorError, match="ask for it with a hold message"):
        elsewhere.handle("train", task(adapter, package))


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_an_update_in_a_codec_is_the_plain_one_nearly(
    name: str, package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    plain, short = device(), device()
    for one in (plain, short):
        one.handle("hold", hold)
    codec = UpdateCodec(name, 0.5)
    wanted = decode(plain.handle("train", task(adapter, package)))
    got = decode(short.handle("train", task(adapter, package, codec=codec)))
    assert {**got.record, "seconds": ""} == {**wanted.record, "seconds": ""}
    tensors = decode_update(got.arrays, adapter, codec)
    moved, apart = (
        np.concatenate([(one[n] - two[n]).reshape(-1) for n in adapter])
        for one, two in ((wanted.arrays, adapter), (tensors, wanted.arrays))
    )
    assert np.linalg.norm(apart) < 0.5 * np.linalg.norm(
        moved
    )  # topk leaves half of the entries out
    assert sum(a.nbytes for a in got.arrays.values()) <= 2 * len(moved)


def test_a_restored_device_adds_what_it_had_left_out_and_a_fresh_one_does_not(
    package: EmulatorPackage, hold: bytes, adapter: dict[str, np.ndarray]
) -> None:
    first, second = (
        task(adapter, package, codec=UpdateCodec("topk", 0.1), server_round=r) for r in (1, 2)
    )
    one, again, fresh = (device() for _ in range(3))
    for each in (one, again, fresh):
        each.handle("hold", hold)
    one.handle("train", first)
    again.restore(one.inventory(), {}, one.unsaid())
    expected = one.handle("train", second)
    assert_same_arrays(again.handle("train", second), expected)
    with pytest.raises(AssertionError):
        assert_same_arrays(fresh.handle("train", second), expected)


def change_arrays(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Payload], Payload]:
    def changed(payload: Payload) -> Payload:
        return Payload({n: change(n, a) for n, a in payload.arrays.items()}, payload.record)

    return changed


def flipped(_: str, part: np.ndarray) -> np.ndarray:
    return np.concatenate([part[:-1], part[-1:] ^ 1])


def not_finite(payload: Payload) -> Payload:
    """Return the message of an honest sender whose emulator has blown up."""
    name, content = next(iter(payload.arrays.items()))
    tensors = read_part(content.tobytes())
    first = next(iter(tensors.values()))
    first.view(-1)[0] = math.nan
    part = part_bytes(tensors)
    manifest = payload.record["manifest"]
    for entry in manifest["parts"]:
        if entry["sha256"] == name:
            entry["sha256"] = part_hash(part)
    what = ("architecture", "blocks", "source_blocks", "layers", "kept_sha256", "parts")
    use = [payload.record["config"], *(manifest[name] for name in what)]
    text = json.dumps(use, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    arrays = {**payload.arrays, part_hash(part): np.frombuffer(part, np.uint8)}
    del arrays[name]
    return Payload(arrays, payload.record)


def change_record(**changes: Any) -> Callable[[Payload], Payload]:
    def change(payload: Payload) -> Payload:
        record = {**payload.record, **changes}
        return Payload(payload.arrays, {k: v for k, v in record.items() if v is not ...})

    return change


def change_config(payload: Payload) -> Payload:
    config = {**payload.record["config"], "rms_norm_eps": 0.1}
    return Payload(payload.arrays, {**payload.record, "config": config})


DAMAGES: dict[str, tuple[Callable[[Payload], Payload], str]] = {
    "one bit of each part": (change_arrays(flipped), "emulator is damaged: the hash of its"),
    "parts cut short": (
        change_arrays(lambda _, a: a[:-8]),
        r"emulator is damaged: its [a-z0-9 ]+ must have \d+ bytes, got \d+",
    ),
    "no parts": (lambda p: Payload({}, p.record), "lacks what is not held here: outside, block 0"),
    "a part too many": (
        lambda p: Payload({**p.arrays, "c0ffee": np.zeros(3, np.uint8)}, p.record),
        "part c0ffee is none of emulator",
    ),
    "a value that is not finite": (not_finite, "has values that are not finite"),
    "no list of what is in use": (change_record(current=...), "current must be a list"),
    "what is in use is text": (change_record(current="all"), "current must be a list"),
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
    "settings is text": ({"settings": "fast"}, "settings of another version: 'fast'"),
    "settings of another version": ({"settings": {"lr": 1}}, "settings of another version"),
    "an entry too many": ({"priority": 1}, "not a train task: TypeError"),
    "steps as text": ({"num_steps": "2"}, "num_steps must be a whole number .* got '2'"),
    "steps True": ({"num_steps": True}, "num_steps must be a whole number"),
    "half a step": ({"num_steps": 0.5}, "num_steps must be a whole number"),
    "negative steps": ({"first_step": -1}, "first_step must be a whole number"),
    "an unknown part": ({"tuned": "lora_C"}, "must be one of all, lora_A, lora_B, got 'lora_C'"),
    "a list of parts": ({"tuned": ["lora_A"]}, "tuned must be one of"),
    "left out is null": ({"left_out": None}, "left_out must be a hash, got None"),
    "rank 0": ({"rank": 0}, r"rank must be a whole number in \[1, 65536\], got 0"),
    "rank True": ({"rank": True}, "rank must be a whole number"),
    "no codec": ({"codec": ...}, "not a train task: KeyError"),
    "codec is text": ({"codec": "int8"}, "codec must be name, kept_ratio and feedback"),
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


def test_a_hello_that_asks_for_no_list_of_parts_is_refused() -> None:
    with pytest.raises(WireError, match="parts must be a list of hashes, got 3"):
        device().handle("hello", encode(Payload(record={"parts": 3})))


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
