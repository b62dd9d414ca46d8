"""Hostile messages at a device: a peer that speaks for the server, and one on its socket."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import threading
import tracemalloc
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import FedPEATError, WireError
from fedpeat.core.version import VERSION
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.examples import Examples
from fedpeat.emulator.package import EmulatorPackage, identity
from fedpeat.emulator.parts import short
from fedpeat.federated import participant
from fedpeat.federated.codecs import UpdateCodec
from fedpeat.federated.flower.cache import Offer, PartCache
from fedpeat.federated.flower.socket_link import receive, send
from fedpeat.federated.flower.worker import Device, _answer_one
from fedpeat.federated.participant import Participant, train_message
from fedpeat.federated.shelf import EmulatorShelf, Rung, hashes_of
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.local import LocalSettings, LocalStats
from hostile import CRAFTED, hostile, meaning, refused
from tiny import random_text, tiny_model, tiny_package

COUNTS = {"hello": 300, "welcome": 300, "hold": 500, "train": 1200, "socket": 400}
KEPT, TUNED = [0, 2, 5], [0, 5]
CONFIG = AdapterConfig(num_bottom=1, num_top=1, r=2, target_modules=("q_proj",))
WELCOME = encode(Payload({"tokenizer.json": np.frombuffer(b"{}", np.uint8)}, {"welcome": "w"}))
HELLO = encode(Payload(record={"version": VERSION, "welcome": "w", "parts": ["0" * 64]}))


class NoNetwork(PartCache):
    """Has all parts on disk, and notes what it is asked to fetch."""

    def __init__(self, folder: Path, parts: Mapping[str, bytes]) -> None:
        super().__init__(folder, "127.0.0.1:1", folder)
        self.asked: list[Mapping[str, Offer]] = []
        for sha256, part in parts.items():
            (folder / sha256).write_bytes(part)

    def fetch(self, offers: Mapping[str, Offer]) -> int:
        self.asked.append(offers)
        return 0

    def forget_all_but(self, current: Collection[str]) -> None:
        pass


@pytest.fixture(scope="module")
def package() -> EmulatorPackage:
    return tiny_package(KEPT)


@pytest.fixture(scope="module")
def rung(package: EmulatorPackage) -> Rung:
    return Rung.of(package, CONFIG, TUNED)


@pytest.fixture(scope="module")
def adapter() -> dict[str, np.ndarray]:
    model = tiny_model("llama", num_blocks=6)
    return attach(model, find_blocks(model), TUNED, CONFIG, seed=1).state()


@pytest.fixture
def cache(rung: Rung, tmp_path: Path) -> NoNetwork:
    return NoNetwork(tmp_path, rung.parts)


def hold_of(rung: Rung) -> bytes:
    def offer(parts: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        return {s: {"num_bytes": len(part), "token": "t"} for s, part in parts.items()}

    return rung.hold_message(rung.parts, hashes_of([rung]), offer)


def task_of(rung: Rung, adapter: Mapping[str, np.ndarray], **changes: Any) -> bytes:
    settings: dict[str, Any] = {
        "server_round": 3,
        "emulator": rung.sha256,
        "num_steps": 2,
        "first_step": 4,
        "settings": LocalSettings(batch_size=2, learning_rate=0.01),
        "seed": 11,
        "codec": UpdateCodec("int8"),
    }
    return train_message(adapter, **{**settings, **changes})


def device(cache: PartCache, *, welcomed: bool = True) -> Device:
    def read(record: Mapping[str, Any], files: Mapping[str, bytes]) -> Examples:
        if record.get("welcome") != "w" or list(files) != ["tokenizer.json"]:
            raise WireError("not a welcome")
        return random_text(num_blocks=5)

    shelf = EmulatorShelf(torch.device("cpu"), torch.float32)
    one = Device("a", cache, shelf, read, lambda _: None)
    if welcomed:
        one.handle("welcome", WELCOME)
    return one


def count_of(one: Device, kind: str, honest: bytes, others: list[bytes]) -> tuple[int, list[bytes]]:
    """Throw hostile messages at a device; return how many it refused, and those it did not.

    Every refusal is an error of ours, in one line: no other kind gets through.
    """
    answered = []
    num_refused = 0
    for content in hostile(honest, others, list(COUNTS).index(kind), COUNTS[kind]):
        reason = refused(lambda: one.handle(kind, content), (FedPEATError,))  # noqa: B023 - called at once
        if reason:
            num_refused += 1
            assert len(reason) < 1000, reason
        else:
            answered.append(content)
    return num_refused, answered


def record_of(content: bytes) -> dict[str, Any]:
    read = meaning(content)
    assert read is not None, "answered, but not a message"
    return read[1]


def test_hostile_greetings_are_refused_or_answered_as_what_they_ask(cache: NoNetwork) -> None:
    one = device(cache)
    num_refused, answered = count_of(one, "hello", HELLO, [WELCOME])
    assert num_refused > 100
    assert all(record_of(content)["version"] == VERSION for content in answered)
    told = decode(one.handle("hello", HELLO)).record
    assert (told["client_id"], told["num_examples"]) == ("a", 5)


def test_hostile_welcomes_are_refused_unless_they_say_the_same(cache: NoNetwork) -> None:
    one = device(cache)
    num_refused, answered = count_of(one, "welcome", WELCOME, [HELLO])
    assert num_refused > 150
    for content in answered:
        read = meaning(content)
        assert read is not None
        assert read[1]["welcome"] == "w"
        assert list(read[0]) == ["tokenizer.json"]
        assert read[0]["tokenizer.json"].dtype == np.uint8


def test_of_hostile_emulators_none_is_held_but_the_real_one(rung: Rung, cache: NoNetwork) -> None:
    one = device(cache)
    honest = hold_of(rung)
    num_refused, answered = count_of(one, "hold", honest, [WELCOME, HELLO])
    assert num_refused > 300
    identical = ("config", "current", "adapter", "tuned_blocks")
    for content in answered:  # the first makes the emulator; what is told of it is its hash
        record = record_of(content)
        assert record["manifest"]["sha256"] == rung.sha256
        assert record["manifest"]["parts"] == record_of(honest)["manifest"]["parts"]
        assert record["config"] == record_of(honest)["config"], identical
    held = decode(one.handle("hello", HELLO)).record["held"]
    assert held == [rung.sha256]
    sizes = {sha256: len(part) for sha256, part in rung.parts.items()}
    for offers in cache.asked:
        assert all(offer.num_bytes == sizes[sha256] for sha256, offer in offers.items())


def test_of_hostile_tasks_those_alone_are_done_that_a_server_may_set(
    rung: Rung,
    cache: NoNetwork,
    adapter: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(participant, "train", lambda *_, **__: LocalStats(1.0, 1.0, 1.0, 9, 0.1))
    one = device(cache)
    one.handle("hold", hold_of(rung))
    honest = task_of(rung, adapter)
    num_refused, answered = count_of(one, "train", honest, [HELLO, WELCOME])
    assert num_refused > 800
    assert len(answered) > 12
    for content in answered:
        assert is_proper_task(content, rung, adapter), content[:2000]
    assert decode(one.handle("train", honest)).record["emulator"] == rung.sha256


def is_proper_task(content: bytes, rung: Rung, adapter: Mapping[str, np.ndarray]) -> bool:
    read = meaning(content)
    if read is None:
        return False
    arrays, record = read
    settings = record["settings"]
    numbers = [value for key, value in settings.items() if key != "batch_size"]
    counts = [record[key] for key in ("server_round", "num_steps", "first_step", "seed")]
    return (
        record["emulator"] == rung.sha256
        and (record["left_out"], record["tuned"]) == ("", "all")
        and record["rank"] in {None, 2}
        and all(type(count) is int and 0 <= count <= 2**64 for count in counts)
        and record["num_steps"] <= 10**6
        and type(settings["batch_size"]) is int
        and 1 <= settings["batch_size"] <= 2**16
        and all(type(x) in {int, float} and 0 <= x <= 1e12 for x in numbers)
        and {n: (a.dtype, a.shape) for n, a in arrays.items()}
        == {n: (a.dtype, a.shape) for n, a in adapter.items()}
        and all(np.isfinite(array).all() for array in arrays.values())
    )


def resigned(rung: Rung, package: EmulatorPackage, **changes: Any) -> bytes:
    """Return a hold message with another manifest whose hash is right: the server lies."""
    payload = decode(hold_of(rung))
    manifest = {**payload.record["manifest"], **changes}
    use = [
        dict(package.config),
        *(manifest[key] for key in ("architecture", "blocks", "source_blocks", "layers")),
        *(manifest[key] for key in ("kept_sha256", "parts")),
    ]
    text = json.dumps(use, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return encode(Payload(record={**payload.record, "manifest": manifest}))


LIES: dict[str, dict[str, Any]] = {
    "another network": {"architecture": "GPT2LMHeadModel"},
    "no network": {"architecture": "pipeline"},
    "a number for a network": {"architecture": 3},
    "a block too many": {"source_blocks": [0, 2, 4, 5]},
    "blocks out of order": {"source_blocks": [5, 2, 0]},
    "blocks as text": {"source_blocks": ["0", "2", "5"]},
    "nested blocks": {"source_blocks": [[0], 2, 5]},
    "no lists": {"blocks": {"lists": []}},
    "a list of 10^9 blocks": {
        "blocks": {"lists": [{"paths": ["model.layers"], "num_blocks": 10**9}]}
    },
    "a list elsewhere": {"blocks": {"lists": [{"paths": ["lm_head"], "num_blocks": 6}]}},
    "a layer of 10^12 rows": {
        "layers": [{"name": "model.layers.0.mlp.up_proj", "kind": "rows", "size": 10**12}]
    },
    "blocks are none": {"blocks": 7},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_emulator_that_is_none_is_refused_though_its_hash_is_right(
    lie: str, rung: Rung, package: EmulatorPackage, cache: NoNetwork
) -> None:
    assert identity(package.config, package.manifest) == rung.sha256
    one = device(cache)
    reason = refused(
        lambda: one.handle("hold", resigned(rung, package, **LIES[lie])), (FedPEATError,)
    )
    assert reason
    assert decode(one.handle("hello", HELLO)).record["held"] == []


BAD_HOLDS: dict[str, tuple[dict[str, Any], str]] = {
    "no manifest": ({"manifest": ...}, "manifest must list its parts, got None"),
    "manifest is a list": ({"manifest": []}, r"must list its parts, got \[\]"),
    "parts are text": ({"manifest": {"parts": "ab"}}, "must list its parts"),
    "a part is a number": ({"manifest": {"parts": [1]}}, "must list its parts"),
    "a part without length": ({"manifest": {"parts": [{"sha256": "a"}]}}, "must have sha256 and"),
    "a part of no bytes": (
        {"manifest": {"parts": [{"sha256": "a", "num_bytes": 0}]}},
        "must have sha256 and num_bytes",
    ),
    "fetch is a list": ({"fetch": []}, r"fetch must be a mapping .* got \[\]"),
    "fetches what is no part": (
        {"fetch": {"0" * 64: {"num_bytes": 9, "token": "t"}}},
        "one of the emulator's parts",
    ),
    "fetches a file": (
        {"fetch": {"../x": {"num_bytes": 9, "token": "t"}}},
        "one of the emulator's",
    ),
    "an offer is text": ({"fetch": {"0" * 64: "t"}}, "an offer must have a token"),
}


@pytest.mark.parametrize("case", BAD_HOLDS)
def test_a_message_that_gives_no_emulator_is_refused_before_anything_is_fetched(
    case: str, rung: Rung, cache: NoNetwork
) -> None:
    changes, reason = BAD_HOLDS[case]
    record = {**decode(hold_of(rung)).record, **changes}
    content = encode(Payload(record={k: v for k, v in record.items() if v is not ...}))
    with pytest.raises(WireError, match=reason):
        device(cache).handle("hold", content)
    assert cache.asked == []


def test_offers_of_another_length_are_refused(rung: Rung, cache: NoNetwork) -> None:
    record = decode(hold_of(rung)).record
    for offer in record["fetch"].values():
        offer["num_bytes"] += 1
    with pytest.raises(WireError, match="the length of one of the emulator's parts"):
        device(cache).handle("hold", encode(Payload(record=record)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_not_tuned(
    value: float, rung: Rung, adapter: dict[str, np.ndarray], cache: NoNetwork
) -> None:
    one = device(cache)
    one.handle("hold", hold_of(rung))
    broken = {name: array.copy() for name, array in adapter.items()}
    next(iter(broken.values()))[0, 0] = value
    with pytest.raises(FedPEATError, match="must be float32, all of it finite"):
        one.handle("train", task_of(rung, broken))


# --- the socket ---------------------------------------------------------------------------------


class Panic(BaseException):
    """What a library in Rust raises when it panics; it is no Exception."""


class Fragile(Device):
    """A device that fails in every way."""

    def __init__(self) -> None:
        self.handled: list[str] = []

    def handle(self, kind: str, content: bytes) -> bytes:
        self.handled.append(kind)
        error = (WireError("no\ud800"), ValueError("odd"), Panic("panicked"), MemoryError())
        if len(content) % 5 < len(error):
            raise error[len(content) % 5]
        return content


def answered(sent: bytes, one: Any) -> tuple[bytes, list[str]]:
    """Return what comes back for some bytes on the socket, and what the worker says."""
    said: list[str] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        _answer_one(theirs, one, said.append)
        theirs.shutdown(socket.SHUT_WR)
        came = b"".join(iter(lambda: ours.recv(2**16), b""))
    return came, said


def framed(*pieces: bytes) -> bytes:
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)


def test_no_frame_on_the_socket_ends_the_worker() -> None:
    rng = np.random.default_rng(0)
    one, whole = Fragile(), 0
    for _ in range(COUNTS["socket"]):
        kind = [b"train", b"hello", b"\xff\xfe", b"", b"x" * 65, rng.bytes(5)][rng.integers(6)]
        content = framed(kind, rng.bytes(int(rng.integers(40))))
        for place in rng.integers(len(content), size=rng.integers(3)):
            content = content[:place] + rng.bytes(1) + content[place + 1 :]
        content = content[: rng.integers(len(content) + 1)] if rng.random() < 0.3 else content
        num_before = len(one.handled)
        came, said = answered(content, one)
        was_handled = len(one.handled) > num_before
        assert bool(came) == was_handled  # who sent no whole message gets no answer
        assert was_handled or said[-1].startswith("a message was cut")
        whole += was_handled
    assert 50 < whole < 200


@pytest.mark.parametrize(
    ("length", "flag"), [(0, b"0"), (1, b"0"), (2, b"0"), (3, b"0"), (4, b"1")]
)
def test_whatever_a_device_raises_is_an_answer(length: int, flag: bytes) -> None:
    came, _ = answered(framed(b"train", b"x" * length), Fragile())
    assert came.startswith(framed(flag))


def test_memory_is_taken_for_what_came_and_not_for_what_was_claimed() -> None:
    sent = framed(b"train") + (2**33).to_bytes(8, "big") + b"only this"
    tracemalloc.start()
    try:
        came, said = answered(sent, Fragile())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (came, said) == (b"", ["a message was cut: the link ended after 9 of 8589934592 bytes"])
    assert peak < 2**22


def test_a_kind_of_message_is_a_short_word() -> None:
    came, said = answered(framed(b"x" * 65, b""), Fragile())
    assert came == b""
    assert said == ["a message was cut: a piece must have at most 64 bytes, got 65"]


def test_pieces_come_whole_however_long_they_are() -> None:
    ours, theirs = socket.socketpair()
    content = np.random.default_rng(0).bytes(3 * 2**20 + 7)
    with ours, theirs:
        sender = threading.Thread(target=send, args=(ours, content))
        sender.start()
        assert receive(theirs) == content
        sender.join()


@pytest.mark.parametrize("name", CRAFTED)
def test_no_crafted_message_is_taken_by_a_device(name: str, cache: NoNetwork) -> None:
    one = Participant(
        "a", random_text(num_blocks=5), EmulatorShelf(torch.device("cpu"), torch.float32)
    )
    for kind in ("hold", "train"):
        assert refused(lambda: one.handle(kind, CRAFTED[name]), (FedPEATError,))  # noqa: B023 - called at once
    assert short("0" * 64) not in one.parts
