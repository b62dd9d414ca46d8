"""Replies asked for one by one: a stuck one waits alone, a slow round of questions is not cut."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedpeat.federated.flower import puller
from fedpeat.federated.flower.puller import Puller

pytestmark = pytest.mark.usefixtures("on_the_server")

_PATIENCE_SECONDS = 20.0


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
    monkeypatch.setattr(puller, "_STUCK_SECONDS", 0.4)


def ids(found: list[tuple[str, Message]]) -> list[str]:
    return [message_id for message_id, _ in found]


def until(
    pulling: Puller, message_ids: list[str], is_enough: Callable[[list[str]], bool]
) -> list[str]:
    """Ask until something holds, and return whose replies have come until then."""
    found: list[str] = []
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        found += ids(pulling.pulled([i for i in message_ids if i not in found]))
        if is_enough(found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"only {found}")


def until_come(pulling: Puller, message_ids: list[str], count: int) -> list[str]:
    """Ask until so many replies have come, and return whose they are in their order."""
    return until(pulling, message_ids, lambda found: len(found) >= count)


def until_stuck(pulling: Puller, message_ids: list[str]) -> list[str]:
    """Ask until a question is left to wait alone, and return whose replies have come."""
    return until(pulling, message_ids, lambda _: bool(pulling.stuck()))


def until_free(pulling: Puller) -> None:
    """Wait until no question is stuck any more."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while pulling.stuck():
        assert time.monotonic() < end, f"still stuck: {pulling.stuck()}"
        time.sleep(0.01)


def test_what_has_come_is_returned_with_its_question() -> None:
    link = Link()
    assert until_come(Puller(link.pull), ["a", "b"], 2) == ["a", "b"]
    assert link.asked == ["a", "b"]


def test_a_stuck_question_waits_alone() -> None:
    link = Link()
    pulling = Puller(link.pull)
    assert until_stuck(pulling, ["a", "stuck", "b"]) == ["a"]
    assert pulling.stuck() == ["stuck"]
    assert until_come(pulling, ["stuck", "b"], 1) == ["b"]
    link.stuck["stuck"].set()
    assert until_come(pulling, ["stuck"], 1) == ["stuck"]
    until_free(pulling)
    assert link.asked == ["a", "stuck", "b"]  # who was stuck does not go on where others did


def test_what_a_stuck_question_found_is_not_asked_for_again() -> None:
    link = Link()
    pulling = Puller(link.pull)
    assert until_stuck(pulling, ["stuck"]) == []
    link.stuck["stuck"].set()
    until_free(pulling)
    assert until_come(pulling, ["stuck"], 1) == ["stuck"]
    assert link.asked == ["stuck"]


def test_many_questions_that_take_their_time_are_asked_once() -> None:
    link = Link(seconds=0.05)
    names = [str(number) for number in range(10)]
    pulling = Puller(link.pull)
    first = ids(pulling.pulled(names))
    assert len(first) < len(names)
    assert pulling.stuck() == []  # it goes on, and is not left
    rest = names[len(first) :]
    assert first + until_come(pulling, rest, len(rest)) == names
    assert link.asked == names


def test_what_comes_of_a_question_that_nobody_has_any_more_is_dropped() -> None:
    link = Link()
    link.errors["stuck"] = ConnectionError("gone")
    pulling = Puller(link.pull)
    assert until_stuck(pulling, ["stuck"]) == []
    link.stuck["stuck"].set()
    until_free(pulling)
    assert until_come(pulling, ["a"], 1) == ["a"]
    with pytest.raises(ConnectionError, match="gone"):
        pulling.pulled(["stuck"])
