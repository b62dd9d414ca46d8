"""Messages over Flower's grid: who is asked, until when, and whose answer is whose."""

from __future__ import annotations

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
from flwr.supercore.task_identity import TaskIdentity

from fedpeat.core.errors import WireError
from fedpeat.core.records import Transport
from fedpeat.federated.flower.messages import from_records, to_records
from fedpeat.federated.flower.transport import FlowerTransport


class FakeGrid(Grid):
    """A SuperLink of two devices and a node without a name, whose answers a test makes up.

    Args:
        refuses: Nodes for which it takes no messages.
    """

    def __init__(self, refuses: Collection[int] = ()) -> None:
        self.refuses = refuses
        self.pushed: dict[str, Message] = {}
        self.answers: list[Message] = []
        self.asked_for: list[list[str]] = []

    def get_nodes(self) -> list[NodeInfo]:
        named = {"ann": 11, "bob": 22, "": 33}
        return [NodeInfo(name=name, node_id=node_id) for name, node_id in named.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]  # type: ignore[misc]  # as Flower

    def _push(self, message: Message) -> str | None:
        node_id = message.metadata.dst_node_id
        if node_id in self.refuses:
            return None
        message.metadata.__dict__["_message_id"] = f"id-{node_id}"  # which the SuperLink gives
        self.pushed[f"id-{node_id}"] = message
        return f"id-{node_id}"

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked_for.append(list(message_ids))
        answers, self.answers = self.answers, []
        return answers

    def answer(self, ticket: str, content: RecordDict | Error) -> None:
        """Let an answer to a message come."""
        question = self.pushed[ticket]
        if isinstance(content, Error):
            self.answers.append(Message(content, reply_to=question))
        else:
            self.answers.append(Message(content, reply_to=question))

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


@pytest.fixture(autouse=True)
def _on_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the process that Flower starts for a run."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def transport(grid: FakeGrid) -> FlowerTransport:
    return FlowerTransport(grid)


def test_it_is_a_transport() -> None:
    assert isinstance(transport(FakeGrid()), Transport)


def test_nodes_are_those_that_have_a_name() -> None:
    assert transport(FakeGrid()).nodes() == ["ann", "bob"]


def test_each_device_is_sent_its_own_message_until_the_deadline() -> None:
    grid = FakeGrid()
    tickets = transport(grid).submit("train", {"bob": b"for bob", "ann": b"for ann"}, 90.0)
    assert tickets == {"id-22": "bob", "id-11": "ann"}
    contents = {node_id: from_records(m.content) for node_id, m in grid.sent().items()}
    assert contents == {11: ("train", b"for ann"), 22: ("train", b"for bob")}
    assert {m.metadata.ttl for m in grid.sent().values()} == {90.0}
    assert {m.metadata.message_type for m in grid.sent().values()} == {"train"}


def test_other_kinds_of_messages_are_queries_that_say_their_kind() -> None:
    grid = FakeGrid()
    transport(grid).submit("hold", {"ann": b"x"}, 1.0)
    assert grid.sent()[11].metadata.message_type == "query"
    assert from_records(grid.sent()[11].content) == ("hold", b"x")


def test_answers_are_told_apart_by_their_tickets_whoever_sends_them() -> None:
    grid = FakeGrid()
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b"x", "bob": b"y"}, 1.0)
    grid.answer("id-22", to_records("train", b"of bob"))
    grid.answer("id-11", Error(5, "no heartbeat"))
    grid.answers[-1].metadata.__dict__["_src_node_id"] = 1  # it comes from the SuperLink
    replies = dict(reaching.poll(tickets))
    assert (replies["id-22"].node, replies["id-22"].content) == ("bob", b"of bob")
    lost = replies["id-11"]
    assert (lost.node, lost.content, lost.error, lost.lost) == ("ann", None, "no heartbeat", True)
    assert reaching.poll({"id-11": "ann"}) == []
    assert grid.asked_for[-1] == ["id-11"]


def test_who_is_not_there_any_more_or_is_refused_is_lost_at_once() -> None:
    grid = FakeGrid(refuses=[22])
    reaching = transport(grid)
    tickets = reaching.submit("train", {"ann": b"", "bob": b"", "gone": b""}, 1.0)
    assert sorted(tickets.values()) == ["ann", "bob", "gone"]
    replies = [reply for _, reply in reaching.poll(tickets)]
    assert {reply.node for reply in replies} == {"bob", "gone"}
    assert all(reply.lost and reply.content is None for reply in replies)
    assert grid.asked_for == [["id-11"]]


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
