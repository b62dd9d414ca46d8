"""A device that is started again knows what it was told."""

from __future__ import annotations

from pathlib import Path

from disk import full_disk
from fedpeat.core.errors import WireError
from fedpeat.federated.flower.recall import Recalling


class Listener:
    """Notes what it is told, and refuses what is bad."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes]] = []

    def handle(self, kind: str, content: bytes) -> bytes:
        if content == b"bad":
            raise WireError("not a message")
        self.told.append((kind, content))
        return content.upper()


def started_again(folder: Path) -> tuple[Listener, list[str]]:
    listener, said = Listener(), list[str]()
    Recalling(listener, folder, said.append).recall()
    return listener, said


def test_what_was_told_last_is_told_again_in_order(tmp_path: Path) -> None:
    device = Recalling(Listener(), tmp_path, print)
    told = [("welcome", b"old"), ("hold", b"e1"), ("hold", b"e2"), ("hello", b"?"), ("train", b"x")]
    assert [device.handle(*message) for message in told] == [b"OLD", b"E1", b"E2", b"?", b"X"]
    device.handle("welcome", b"new")
    assert started_again(tmp_path)[0].told == [("welcome", b"new"), ("hold", b"e2")]


def test_the_first_start_recalls_nothing(tmp_path: Path) -> None:
    listener, said = started_again(tmp_path)
    assert (listener.told, said) == ([], [])


def test_what_could_not_be_answered_is_not_told_again(tmp_path: Path) -> None:
    device = Recalling(Listener(), tmp_path, print)
    device.handle("welcome", b"good")
    for kind in ("welcome", "hold"):
        try:
            device.handle(kind, b"bad")
        except WireError:
            continue
        raise AssertionError("a bad message was answered")
    assert started_again(tmp_path)[0].told == [("welcome", b"good")]


def test_a_full_disk_is_said_and_the_answer_given_all_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    device = Recalling(Listener(), tmp_path, said.append)
    with full_disk(10):
        assert device.handle("welcome", b"w" * 100) == b"W" * 100
    assert len(said) == 1
    assert "cannot write" in said[0]
    assert started_again(tmp_path)[0].told == []


def test_a_message_that_is_of_no_use_any_more_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "welcome.message").write_bytes(b"bad")
    (tmp_path / "hold.message").write_bytes(b"e1")
    listener, said = started_again(tmp_path)
    assert listener.told == []  # an emulator is of no use to whom nobody has welcomed
    assert said == ["cannot go on as before: WireError: not a message"]
