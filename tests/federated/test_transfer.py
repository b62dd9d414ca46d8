"""Bringing an emulator to a device: cut as often as it may be, and never in memory twice."""

from __future__ import annotations

import hashlib
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn

from fedpeat.config.schema import AdapterConfig
from fedpeat.core.wire import Payload, encode
from fedpeat.emulator.package import pack_emulator
from fedpeat.federated.flower.cache import Offer, PartCache
from fedpeat.federated.flower.depot import Depot
from fedpeat.federated.flower.gate import GateSettings, gate
from fedpeat.federated.flower.keys import DeviceKeys, device_keys, make_keys, server_keys
from fedpeat.federated.flower.worker import Device
from fedpeat.federated.shelf import EmulatorShelf, Rung, hashes_of
from fedpeat.model.blocks import find_blocks
from tiny import random_text, tiny_model
from transfer import CuttingProxy

NUM_BLOCKS = 12
RECORD_BYTES = 2**14  # what a cut may cost: a record of TLS that had not come to its end
GREETING_BYTES = 2**13  # certificates and headers of one connection


@pytest.fixture(scope="module")
def rung() -> Rung:
    """Return an emulator of 12 equal blocks, 1.9 MB each, as the round loop sees it."""
    model = tiny_model("llama", NUM_BLOCKS, hidden_size=128, intermediate_size=1024)
    package = pack_emulator(
        model,
        model,
        find_blocks(model),
        range(NUM_BLOCKS),
        recipe="",
        dtype=torch.float32,
        parent_sha256="",
    )
    return Rung.of(package, AdapterConfig(r=2), range(NUM_BLOCKS))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["localhost"], ["ann"])
    return folder


@pytest.fixture
def gate_port(keys: Path, tmp_path: Path) -> Iterator[int]:
    """Serve the parts in ``tmp_path`` over TLS; return the port."""
    server = server_keys(keys / "server")
    (tmp_path / "secret").write_bytes(b"a secret")
    ca, certificate, key = str(server.ca), str(server.certificate), str(server.key)
    parts, secret = str(tmp_path / "parts"), str(tmp_path / "secret")
    settings = GateSettings("", 0, "127.0.0.1:1", ca, certificate, key, parts, secret, "")
    config = uvicorn.Config(
        gate(settings), ssl_certfile=certificate, ssl_keyfile=key, log_level="critical", ws="none"
    )
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def ann(keys: Path) -> DeviceKeys:
    return device_keys(keys / "devices" / "ann")


def most_traced(call: Callable[[], object]) -> int:
    """Return the most memory that a call takes at a time, in Python and NumPy [byte]."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_part_that_is_cut_more_often_than_it_is_tried_comes_and_hardly_a_byte_twice(
    gate_port: int, ann: DeviceKeys, tmp_path: Path
) -> None:
    part = np.random.default_rng(0).bytes(2**20)
    sha256 = hashlib.sha256(part).hexdigest()
    offered = Depot(tmp_path / "parts", tmp_path / "secret").offer({sha256: part})
    num_cuts = 12
    cuts = [len(part) * (i + 1) // (num_cuts + 1) for i in range(num_cuts)]
    with CuttingProxy(gate_port, cuts) as proxy:
        cache = PartCache(tmp_path / "cache", f"localhost:{proxy.port}", ann.ca)
        came = cache.fetch({sha256: Offer(**offered[sha256])})
    assert not proxy.cuts
    assert came == len(part)
    assert cache.arrays([sha256])[sha256].tobytes() == part
    assert proxy.num_bytes < len(part) + (num_cuts + 1) * (RECORD_BYTES + GREETING_BYTES)


def test_a_device_builds_an_emulator_with_one_part_at_a_time_in_memory(
    rung: Rung, ann: DeviceKeys, tmp_path: Path
) -> None:
    cache = PartCache(tmp_path, "localhost:1", ann.ca)
    for sha256, content in rung.parts.items():
        (tmp_path / sha256).write_bytes(content)
    device = Device(
        "ann",
        cache,
        EmulatorShelf(torch.device("cpu"), torch.float32),
        lambda *_: random_text(),
        lambda _: None,
    )
    device.handle("welcome", encode(Payload(record={"welcome": ""})))
    hold = rung.hold_message((), hashes_of([rung]), lambda _: {})
    peak = most_traced(lambda: device.handle("hold", hold))
    sizes = [len(part) for part in rung.parts.values()]
    assert peak < 4 * max(sizes) < sum(sizes) / 2  # as read, as bytes, and its tensors


def test_a_rung_is_put_on_a_shelf_in_this_process_without_a_copy(rung: Rung) -> None:
    payload = rung.hold_payload(rung.parts, hashes_of([rung]))
    assert payload.arrays.keys() == rung.parts.keys()
    for sha256, array in payload.arrays.items():
        assert np.shares_memory(array, np.frombuffer(rung.parts[sha256], np.uint8))


def test_an_offer_of_parts_takes_no_memory_for_them(rung: Rung, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"a secret")
    depot = Depot(tmp_path / "parts", tmp_path / "secret")
    current = hashes_of([rung])
    peak = most_traced(lambda: rung.hold_message(rung.parts, current, depot.offer))
    assert peak < max(len(part) for part in rung.parts.values()) / 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "parts").iterdir()} == dict(rung.parts)
