"""Parts of emulators on their way from a depot, through a gate, onto a device's disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disk import full_disk
from fedpeat.core.errors import StorageError, WireError
from fedpeat.emulator.parts import short
from fedpeat.federated.flower import cache
from fedpeat.federated.flower.cache import Offer, PartCache
from fedpeat.federated.flower.depot import Depot
from fedpeat.federated.flower.keys import ServerKeys
from fleet.doors import Door, cutting_server, keys_in, open_gate

PART = bytes(range(256)) * 400
SHA256 = hashlib.sha256(PART).hexdigest()
OTHER = b"another part"
OTHER_SHA256 = hashlib.sha256(OTHER).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> ServerKeys:
    return keys_in(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def door(keys: ServerKeys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_gate(tmp_path_factory.mktemp("gate"), keys, keys) as door:
        yield door


@pytest.fixture
def offers(door: Door) -> dict[str, Offer]:
    """What a depot behind the gate offers."""
    offered = Depot(door.parts, door.secret).offer({SHA256: PART, OTHER_SHA256: OTHER})
    return {sha256: Offer(**offer) for sha256, offer in offered.items()}


def cache_at(place: str | Door, folder: Path, keys: ServerKeys) -> PartCache:
    server = place if isinstance(place, str) else f"localhost:{place.port}"
    return PartCache(folder, server, keys.ca)


def test_parts_come_as_they_were_offered_and_only_once(
    door: Door, keys: ServerKeys, offers: dict[str, Offer], tmp_path: Path
) -> None:
    first = cache_at(door, tmp_path, keys)
    assert first.fetch(offers) == len(PART) + len(OTHER)
    assert first.fetch(offers) == 0
    again = cache_at("localhost:1", tmp_path, keys)  # after a restart; nobody is asked
    assert again.held() == sorted([SHA256, OTHER_SHA256])
    assert again.fetch(offers) == 0
    assert bytes(again.arrays([SHA256])[SHA256]) == PART


def test_what_came_before_a_restart_is_not_fetched_again(
    door: Door, keys: ServerKeys, offers: dict[str, Offer], tmp_path: Path
) -> None:
    (tmp_path / f"{SHA256}.partial").write_bytes(PART[:60_000])
    parts = cache_at(door, tmp_path, keys)
    assert parts.held() == []
    assert parts.fetch({SHA256: offers[SHA256]}) == len(PART) - 60_000
    assert bytes(parts.arrays([SHA256])[SHA256]) == PART


def partial_content(num_bytes: int, content: bytes = PART) -> Callable[[bytes], bytes]:
    """Return an answer that promises the rest of a part, and is cut after some bytes."""

    def answer(request: bytes) -> bytes:
        found = re.search(rb"[Rr]ange: bytes=(\d+)-", request)
        assert found is not None
        rest = content[int(found[1]) :]
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(rest)}\r\n\r\n"
        return head.encode() + rest[:num_bytes]

    return answer


def test_a_cut_transfer_goes_on_where_it_was_cut(keys: ServerKeys, tmp_path: Path) -> None:
    with cutting_server(keys, partial_content(40_000)) as (place, requests):
        came = cache_at(place, tmp_path, keys).fetch({SHA256: Offer(len(PART), "token")})
    assert came == len(PART)
    assert (tmp_path / SHA256).read_bytes() == PART
    ranges = [re.findall(rb"bytes=(\d+)-", request)[0] for request in requests]
    assert ranges == [b"0", b"40000", b"80000"]


def test_a_part_with_another_hash_is_thrown_away(keys: ServerKeys, tmp_path: Path) -> None:
    wrong = partial_content(len(PART), content=PART[:-1] + b"\0")
    with (
        cutting_server(keys, wrong) as (place, requests),
        pytest.raises(WireError, match=f"part {SHA256[:12]} did not come .* has another hash"),
    ):
        cache_at(place, tmp_path, keys).fetch({SHA256: Offer(len(PART), "token")})
    assert len(requests) > 1, "it is tried again, from the start"
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_longer_than_said_is_not_taken(keys: ServerKeys, tmp_path: Path) -> None:
    longer = partial_content(2 * len(PART), content=PART * 2)
    with (
        cutting_server(keys, longer) as (place, _),
        pytest.raises(WireError, match=f"must have {len(PART)} bytes, got more"),
    ):
        cache_at(place, tmp_path, keys).fetch({SHA256: Offer(len(PART), "token")})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len(PART)


def test_a_part_is_not_fetched_with_another_token(
    door: Door, keys: ServerKeys, offers: dict[str, Offer], tmp_path: Path
) -> None:
    parts = cache_at(door, tmp_path, keys)
    with pytest.raises(WireError, match=f"must send part {SHA256[:12]}, got status 401"):
        parts.fetch({SHA256: Offer(len(PART), offers[OTHER_SHA256].token)})
    assert parts.held() == []


def test_a_full_disk_is_told_and_what_came_is_of_use_later(
    door: Door, keys: ServerKeys, offers: dict[str, Offer], tmp_path: Path
) -> None:
    parts = cache_at(door, tmp_path, keys)
    with full_disk(50_000), pytest.raises(StorageError, match="File too large"):
        parts.fetch({SHA256: offers[SHA256]})
    assert parts.held() == []
    assert parts.fetch({SHA256: offers[SHA256]}) < len(PART)
    assert parts.held() == [SHA256]


def test_nobody_who_is_not_the_server_is_believed(
    door: Door, offers: dict[str, Offer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_NUM_TRIES", 1)
    other = keys_in(tmp_path / "other")
    with pytest.raises(WireError, match="CERTIFICATE_VERIFY_FAILED"):
        cache_at(door, tmp_path / "parts", other).fetch(offers)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "", SHA256[:-1], SHA256.upper()])
def test_what_is_not_called_by_a_hash_is_not_fetched(
    keys: ServerKeys, tmp_path: Path, name: str
) -> None:
    parts = cache_at("localhost:1", tmp_path / "parts", keys)
    with pytest.raises(WireError, match="a part must be called by its hash"):
        parts.fetch({name or "x": Offer(1, "token")})


def test_parts_of_no_use_are_deleted_half_ones_too(keys: ServerKeys, tmp_path: Path) -> None:
    parts = cache_at("localhost:1", tmp_path, keys)
    for name in (SHA256, OTHER_SHA256, "f" * 64 + ".partial", SHA256 + ".partial"):
        (tmp_path / name).write_bytes(b"x")
    parts.forget_all_but([short(SHA256)])
    assert {path.name for path in tmp_path.iterdir()} == {SHA256, SHA256 + ".partial"}


def test_a_depot_mends_a_part_that_a_kill_left_half_written(door: Door, tmp_path: Path) -> None:
    depot = Depot(tmp_path / "parts", door.secret)
    (tmp_path / "parts" / SHA256).write_bytes(PART[:10])
    offered = depot.offer({SHA256: PART})
    assert (tmp_path / "parts" / SHA256).read_bytes() == PART
    assert offered[SHA256]["num_bytes"] == len(PART)


def test_an_offer_expires(door: Door, keys: ServerKeys, tmp_path: Path) -> None:
    offered = Depot(door.parts, door.secret, valid_seconds=-1).offer({SHA256: PART})
    with pytest.raises(WireError, match="got status 401"):
        cache_at(door, tmp_path, keys).fetch({SHA256: Offer(**offered[SHA256])})
