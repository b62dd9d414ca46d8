"""Replies asked for one by one: a stuck one waits alone, a slow round of questions is not cut."""

from __future__ import annotations

import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedpeat.federated.flower import puller
from fedpeat.federated.flower.puller import Puller

pytestmark = pytest.mark.usefixtures("on_the_server")


class Link:
    """Answers to questions; some wait until they may be given."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.stuck = {"stuck": threading.Event()}
        self.errors: dict[str, Exception] = {}
        self.asked: list[str] = []

    def pull(self, message_ids: list[str]) -> list[Message]:
        (message_id,) = message_ids
        self.asked.append(message_id)
        time.sleep(self.seconds)
        if message_id in self.stuck:
            self.stuck[message_id].wait()
        if message_id in self.errors:
            raise self.errors[message_id]
        records = RecordDict({"of": ConfigRecord({"id": message_id})})
        return [Message(records, dst_node_id=1, message_type="query")]


@pytest.fixture(autouse=True)
def _soon_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puller, "_STUCK_SECONDS", 0.05)


def ids(found: list[tuple[str, Message]]) -> list[str]:
    return [message_id for message_id, _ in found]


def until_all(pulling: Puller, message_ids: list[str]) -> list[str]:
    """Ask until everything has come, and return it in its order."""
    found: list[str] = []
    for _ in range(200):
        found += ids(pulling.pulled([i for i in message_ids if i not in found]))
        if len(found) == len(message_ids):
            return found
    raise AssertionError(f"only {found}")


def test_what_has_come_is_returned_with_its_question() -> None:
    link = Link()
    assert ids(Puller(link.pull).pulled(["a", "b"])) == ["a", "b"]
    assert link.asked == ["a", "b"]


def test_a_stuck_question_waits_alone() -> None:
    link = Link()
    pulling = Puller(link.pull)
    assert ids(pulling.pulled(["a", "stuck", "b"])) == ["a"]
    assert pulling.stuck() == ["stuck"]
    assert ids(pulling.pulled(["stuck", "b"])) == ["b"]
    link.stuck["stuck"].set()
    assert until_all(pulling, ["stuck"]) == ["stuck"]
    assert pulling.stuck() == []
    assert link.asked == ["a", "stuck", "b"]  # who was stuck does not go on where others did


def test_many_questions_that_take_their_time_are_asked_once() -> None:
    link = Link(seconds=0.02)
    names = [str(number) for number in range(10)]
    pulling = Puller(link.pull)
    first = ids(pulling.pulled(names))
    assert pulling.stuck() == []  # it goes on, and is not left
    assert first + until_all(pulling, names[len(first) :]) == names
    assert link.asked == names


def test_what_comes_of_a_question_that_nobody_has_any_more_is_dropped() -> None:
    link = Link()
    link.errors["stuck"] = ConnectionError("gone")
    pulling = Puller(link.pull)
    assert pulling.pulled(["stuck"]) == []
    link.stuck["stuck"].set()
    while pulling.stuck():
        time.sleep(0.01)
    assert ids(pulling.pulled(["a"])) == ["a"]
    with pytest.raises(ConnectionError, match="gone"):
        pulling.pulled(["stuck"])
