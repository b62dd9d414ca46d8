"""Messages over Flower's grid: who is asked, until when, and whose answer is whose."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable

import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    RecordDict,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fakes import FakeClock
from fedpeat.core.errors import WireError
from fedpeat.core.records import Reply, Transport
from fedpeat.federated.flower import puller
from fedpeat.federated.flower import transport as flower_transport
from fedpeat.federated.flower.messages import from_records, to_records
from fedpeat.federated.flower.transport import FlowerTransport


class FakeGrid(Grid):
    """A SuperLink of two devices and a node without a name, whose answers a test makes up.

    Args:
        refuses: Nodes for which it takes no messages.
    """

    def __init__(self, refuses: Collection[int] = ()) -> None:
        self.refuses = refuses
        self.online = {"ann": 11, "bob": 22, "": 33}
        self.activated = dict.fromkeys(self.online, "first")
        self.pushed: dict[str, Message] = {}
        self.answers: dict[str, list[Message]] = {}
        self.asked_for: list[str] = []

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(name=name, node_id=node_id, last_activated_at=self.activated[name])
            for name, node_id in self.online.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]  # type: ignore[misc]  # as Flower

    def _push(self, message: Message) -> str | None:
        node_id = message.metadata.dst_node_id
        if node_id in self.refuses:
            return None
        again = sum(m.metadata.dst_node_id == node_id for m in self.pushed.values())
        message_id = f"id-{node_id}" + "-again" * again
        message.metadata.__dict__["_message_id"] = message_id  # which the SuperLink gives
        self.pushed[message_id] = message
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids  # one at a time: one that is stuck holds up no other
        self.asked_for.append(message_id)
        return self.answers.pop(message_id, [])

    def answer(self, message_id: str, content: RecordDict | Error) -> None:
        """Let an answer to a message come."""
        answer = Message(content, reply_to=self.pushed[message_id])
        self.answers.setdefault(message_id, []).append(answer)

    def sent(self) -> dict[int, Message]:
        """Return the messages by the node that they are for."""
        return {message.metadata.dst_node_id: message for message in self.pushed.values()}

    def set_run(self, run: object) -> None:
        raise AssertionError

    @property
    def run(self) -> Run:
        raise AssertionError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise AssertionError

    def get_node_ids(self) -> list[int]:
        raise AssertionError

    def send_and_receive(self, *args: object, **kwargs: object) -> list[Message]:
        raise AssertionError("it blocks until all have answered")


pytestmark = pytest.mark.usefixtures("on_the_server")


def transport(grid: FakeGrid) -> FlowerTransport:
    return FlowerTransport(grid)


def test_it_is_a_transport() -> None:
    assert isinstance(transport(FakeGrid()), Transport)


def test_nodes_are_those_that_have_a_name() -> None:
    assert transport(FakeGrid()).nodes() == ["ann", "bob"]


def test_each_device_is_sent_its_own_message_until_the_deadline() -> None:
    grid = FakeGrid()
    tickets = transport(grid).submit("train", {"bob": b"for bob", "ann": b"for ann"}, 90.0)
    assert list(tickets.values()) == ["bob", "ann"]
    contents = {node_id: from_records(m.content) for node_id, m in grid.sent().items()}
    assert contents == {11: ("train", b"for ann"), 22: ("train", b"for bob")}
    assert {round(m.metadata.ttl, 1) for m in grid.sent().values()} == {90.0}
    assert {m.metadata.message_type for m in grid.sent().values()} == {"train"}


def test_other_kinds_of_messages_are_queries_that_say_their_kind() -> None:
    grid = FakeGrid()
    transport(grid).submit("hold", {"ann": b"x"}, 1.0)
    assert grid.sent()[11].metadata.message_type == "query"
    assert from_records(grid.sent()[11].content) == ("hold", b"x")


def test_answers_are_told_apart_by_their_messages_whoever_sends_them() -> None:
    grid = FakeGrid()
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 1.0)
    grid.answer("id-22", to_records("train", b"of bob"))
    grid.answer("id-11", Error(2, "no memory"))
    grid.answers["id-11"][0].metadata.__dict__["_src_node_id"] = 1  # it comes from the SuperLink
    replies = {tickets[ticket]: reply for ticket, reply in reaching.poll(tickets)}
    assert replies == {
        "ann": Reply("ann", error="no memory", lost=True),
        "bob": Reply("bob", b"of bob"),
    }
    grid.asked_for.clear()
    assert reaching.poll(tickets) == []
    assert grid.asked_for == []  # both are known


def test_who_is_not_there_any_more_or_is_refused_is_lost_at_once() -> None:
    grid = FakeGrid(refuses=[22])
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b"", "bob": b"", "gone": b""}, 1.0)
    assert sorted(tickets.values()) == ["ann", "bob", "gone"]
    replies = [reply for _, reply in reaching.poll(tickets)]
    assert {reply.node for reply in replies} == {"bob", "gone"}
    assert all(reply.lost and reply.content is None for reply in replies)
    assert grid.asked_for == ["id-11"]


def test_devices_are_told_that_there_is_something_for_them() -> None:
    grid = FakeGrid()
    rung: list[int] = []
    reaching = FlowerTransport(grid, lambda: rung.append(len(grid.pushed)))
    reaching.submit("train", {"ann": b"", "bob": b""}, 1.0)
    assert rung == [2]
    reaching.submit("train", {"gone": b""}, 1.0)
    assert rung == [2]


# --- devices that are started again -------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(flower_transport, "time", clock)
    return clock


def come_again(grid: FakeGrid, name: str) -> None:
    grid.activated[name] = f"{grid.activated[name]}, again"


def asked() -> tuple[FakeGrid, FlowerTransport, dict[str, str]]:
    """Return a fleet whose device ann was sent a task."""
    grid = FakeGrid()
    reaching = transport(grid)
    return grid, reaching, reaching.submit("train", {"ann": b"x"}, 60.0)


def asked_again(clock: FakeClock) -> tuple[FakeGrid, FlowerTransport, dict[str, str]]:
    """Return a fleet whose device ann was sent its task a second time, as "id-11-again"."""
    grid, reaching, tickets = asked()
    clock.sleep(5)
    come_again(grid, "ann")
    assert reaching.poll(tickets) == []
    return grid, reaching, tickets


def test_a_task_is_sent_again_to_a_device_that_was_started_again(clock: FakeClock) -> None:
    grid = FakeGrid()
    rung: list[int] = []
    reaching = FlowerTransport(grid, lambda: rung.append(len(grid.pushed)))
    tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 60.0)
    clock.sleep(5)
    come_again(grid, "ann")
    assert reaching.poll(tickets) == []
    assert list(grid.pushed) == ["id-11", "id-22", "id-11-again"]
    assert from_records(grid.pushed["id-11-again"].content) == ("train", b"x")
    assert grid.pushed["id-11-again"].metadata.ttl == 55.0
    assert rung == [2, 3]
    clock.sleep(5)
    assert reaching.poll(tickets) == []
    assert len(grid.pushed) == 3  # once for each time that it came
    grid.answer("id-11-again", to_records("train", b"done"))
    assert [reply for _, reply in reaching.poll(tickets)] == [Reply("ann", b"done")]


def test_whichever_answer_comes_first_counts_and_counts_once(clock: FakeClock) -> None:
    grid, reaching, tickets = asked_again(clock)
    grid.answer("id-11", to_records("train", b"of the first"))
    grid.answer("id-11-again", to_records("train", b"of the second"))
    assert [reply for _, reply in reaching.poll(tickets)] == [Reply("ann", b"of the first")]
    assert reaching.poll(tickets) == []


def test_an_error_of_a_message_that_was_sent_again_since_is_none(clock: FakeClock) -> None:
    grid, reaching, tickets = asked_again(clock)
    grid.answer("id-11", Error(3, "never whole"))
    assert reaching.poll(tickets) == []
    grid.answer("id-11-again", Error(3, "never whole either"))
    ((_, reply),) = reaching.poll(tickets)
    assert reply == Reply("ann", error="never whole either", lost=True)


def test_a_device_that_goes_is_waited_for_a_little(clock: FakeClock) -> None:
    grid = FakeGrid()
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 60.0)
    for name in ("ann", "bob"):
        grid.answer(f"id-{grid.online.pop(name)}", Error(5, "unavailable"))
    assert reaching.poll(tickets) == []
    clock.sleep(10)
    grid.online["ann"] = 11  # its heartbeat had failed for a while
    assert reaching.poll(tickets) == []
    assert list(grid.pushed) == ["id-11", "id-22", "id-11-again"]
    clock.sleep(15)
    grid.answer("id-11-again", to_records("train", b"done"))
    replies = sorted((reply for _, reply in reaching.poll(tickets)), key=lambda r: r.node)
    assert replies == [Reply("ann", b"done"), Reply("bob", error="unavailable", lost=True)]


def test_a_task_whose_process_ended_on_the_device_is_sent_twice_more(clock: FakeClock) -> None:
    grid, reaching, tickets = asked()
    for message_id in ("id-11", "id-11-again"):
        clock.sleep(5)
        grid.answer(message_id, Error(8, "it ended"))
        assert reaching.poll(tickets) == []
        clock.sleep(5)
        assert reaching.poll(tickets) == []
    assert list(grid.pushed) == ["id-11", "id-11-again", "id-11-again-again"]
    grid.answer("id-11-again-again", Error(8, "it ended once more"))
    ((_, reply),) = reaching.poll(tickets)
    assert reply == Reply("ann", error="it ended once more", lost=True)


def test_nothing_is_sent_again_when_the_time_is_over(clock: FakeClock) -> None:
    grid, reaching, tickets = asked()
    clock.sleep(59.5)
    come_again(grid, "ann")
    assert reaching.poll(tickets) == []
    assert list(grid.pushed) == ["id-11"]


def test_a_task_whose_time_is_over_is_forgotten_with_the_next(clock: FakeClock) -> None:
    grid, reaching, old = asked()
    clock.sleep(61)
    reaching.submit("train", {"bob": b"y"}, 60.0)
    grid.asked_for.clear()
    assert reaching.poll(old) == []
    assert grid.asked_for == []


# --- replies that never come whole --------------------------------------------------------------


class Stuck(FakeGrid):
    """A SuperLink at which replies of the device ann begin, and do not end until they may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = list(message_ids)
        if asked[0].startswith("id-11"):
            self.may_end.wait()
        return super().pull_messages(asked)


def poll_until(reaching: FlowerTransport, tickets: dict[str, str], node: str) -> Reply:
    for _ in range(500):
        for _, reply in reaching.poll(tickets):
            if reply.node == node:
                return reply
        time.sleep(0.01)
    raise AssertionError(f"no reply of {node}")


def test_a_reply_that_does_not_come_whole_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(puller, "_STUCK_SECONDS", 0.05)
    grid = Stuck()
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 60.0)
    start = time.monotonic()
    assert reaching.poll(tickets) == []
    assert time.monotonic() - start < 2
    grid.answer("id-22", to_records("train", b"of bob"))
    assert poll_until(reaching, tickets, "bob").content == b"of bob"
    grid.answer("id-11", to_records("train", b"of ann"))
    grid.may_end.set()
    assert poll_until(reaching, tickets, "ann").content == b"of ann"


def test_a_device_that_ends_none_of_its_replies_is_not_asked_for_more(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    monkeypatch.setattr(puller, "_STUCK_SECONDS", 0.05)
    grid = Stuck()
    reaching = transport(grid)
    for _ in range(3):
        tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 60.0)
        for _ in range(4):
            assert reaching.poll(tickets) == []
        clock.sleep(61)
    before = len(grid.pushed)
    tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 60.0)
    assert len(grid.pushed) == before + 1  # bob's
    ((_, reply),) = reaching.poll(tickets)
    assert reply == Reply("ann", error="has begun 3 replies and ended none", lost=True)
    grid.may_end.set()


def test_a_superlink_that_fails_is_told_to_who_asks() -> None:
    class Failing(FakeGrid):
        def pull_messages(self, _: Iterable[str]) -> list[Message]:
            raise ConnectionError("no SuperLink")

    reaching = transport(Failing())
    tickets = reaching.submit("train", {"ann": b"x"}, 60.0)
    with pytest.raises(ConnectionError, match="no SuperLink"):
        reaching.poll(tickets)


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"kind": ConfigRecord({"kind": "train"})}),
        RecordDict(
            {
                "content": ArrayRecord({"bytes": Array("uint8", (1,), "numpy.ndarray", b"x")}),
                "kind": ConfigRecord({"kind": "train"}),
            }
        ),
        RecordDict(
            {
                "content": ArrayRecord({"bytes": Array("uint8", (1,), "fedpeat", b"x")}),
                "kind": ConfigRecord({"kind": 7}),
            }
        ),
    ],
    ids="empty no-content numpy no-kind".split(),
)
def test_records_that_are_no_message_are_refused(records: RecordDict) -> None:
    with pytest.raises(WireError, match="not a fedpeat message"):
        from_records(records)
    grid = FakeGrid()
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b""}, 1.0)
    grid.answer("id-11", records)
    ((_, reply),) = reaching.poll(tickets)
    assert reply.content is None
    assert "not a fedpeat message" in reply.error


def test_bytes_travel_untouched() -> None:
    content = bytes(range(256))
    assert from_records(to_records("train", content)) == ("train", content)
