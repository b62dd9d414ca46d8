"""The transport of simulations, and the one that loses tasks on the way."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fedpeat.core.errors import EmulatorError
from fedpeat.core.records import Reply, Transport
from fedpeat.federated.in_process import InProcessTransport, UnreliableTransport


def echo(kind: str, content: bytes) -> bytes:
    return kind.encode() + b":" + content


def noting(ran: list[str], node: str) -> Callable[[str, bytes], bytes]:
    """Return a handler that notes that it ran, and what it was given."""

    def handler(kind: str, content: bytes) -> bytes:
        ran.append(node + content.decode())
        return b""

    return handler


def deliver(
    transport: Transport, kind: str, tasks: dict[str, bytes], deadline: float | None = None
) -> dict[str, Reply]:
    """Submit and poll until everything is answered; a transport that stalls ends the test."""
    waiting = transport.submit(kind, tasks, deadline)
    replies = {}
    for _ in range(len(tasks) + 1):
        for ticket, reply in transport.poll(waiting):
            replies[waiting.pop(ticket)] = reply
        if not waiting:
            return replies
    pytest.fail(f"never answered: {waiting}")


def lost_of(transport: Transport, tasks: dict[str, bytes], kind: str = "train") -> set[str]:
    return {node for node, reply in deliver(transport, kind, tasks).items() if reply.lost}


def test_every_node_answers_with_its_own_handler() -> None:
    transport = InProcessTransport({"a": echo, "b": lambda kind, content: b"b"})
    assert transport.nodes() == ["a", "b"]
    replies = deliver(transport, "train", {"b": b"1", "a": b"2"})
    assert replies == {"a": Reply("a", b"train:2"), "b": Reply("b", b"b")}


def test_tasks_run_one_at_a_time_in_their_order() -> None:
    ran: list[str] = []
    transport = InProcessTransport({n: noting(ran, n) for n in "abc"})
    tickets = transport.submit("train", {"c": b"", "a": b"", "b": b""}, None)
    assert ran == []
    assert len(transport.poll(tickets)) == 1
    assert ran == ["c"]
    transport.poll(tickets)
    transport.poll(tickets)
    assert ran == ["c", "a", "b"]
    assert transport.poll(tickets) == []


@pytest.mark.parametrize("error", [EmulatorError("no such emulator"), KeyError("x"), MemoryError()])
def test_a_task_that_raises_is_a_reply_with_the_reason(error: Exception) -> None:
    def handler(kind: str, content: bytes) -> bytes:
        raise error

    replies = deliver(
        InProcessTransport({"bad": handler, "good": echo}), "train", {"bad": b"", "good": b""}
    )
    assert replies["bad"] == Reply("bad", error=f"{type(error).__name__}: {error}")
    assert replies["good"].content == b"train:"


def test_ctrl_c_is_not_swallowed() -> None:
    def handler(kind: str, content: bytes) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deliver(InProcessTransport({"a": handler}), "train", {"a": b""})


def test_tasks_past_their_deadline_are_forgotten() -> None:
    ran: list[str] = []
    transport = InProcessTransport({"a": noting(ran, "")})
    old = transport.submit("train", {"a": b"old"}, 0.001)
    time.sleep(0.002)
    deliver(transport, "train", {"a": b"new"})
    assert transport.poll(old) == []
    assert ran == ["new"]


# --- losses -------------------------------------------------------------------------------------

TASKS = {f"c{i:04d}": b"task" for i in range(500)}


def unreliable(ratio: float, seed: int = 0) -> UnreliableTransport:
    return UnreliableTransport(InProcessTransport(dict.fromkeys(TASKS, echo)), ratio, seed)


def test_about_the_right_share_is_lost() -> None:
    # 500 draws with probability 0.3: 150, standard deviation 10.2
    assert abs(len(lost_of(unreliable(0.3), TASKS)) - 150) < 4 * 10.2


def test_no_share_loses_none() -> None:
    assert lost_of(unreliable(0.0), TASKS) == set()


def test_the_same_task_is_lost_again_in_another_process() -> None:
    assert lost_of(unreliable(0.3), TASKS) == lost_of(unreliable(0.3), TASKS)


def test_losses_do_not_depend_on_what_else_was_sent() -> None:
    one = unreliable(0.3)
    deliver(one, "train", dict.fromkeys(TASKS, b"an earlier round"))
    few = {node: TASKS[node] for node in list(TASKS)[:100]}
    assert lost_of(one, few) == lost_of(unreliable(0.3), TASKS) & set(few)


def test_another_round_or_seed_loses_others() -> None:
    lost = lost_of(unreliable(0.3), TASKS)
    assert lost_of(unreliable(0.3), dict.fromkeys(TASKS, b"another round")) != lost
    assert lost_of(unreliable(0.3, seed=1), TASKS) != lost


@pytest.mark.parametrize("kind", ["hello", "hold"])
def test_only_training_is_lost(kind: str) -> None:
    assert lost_of(unreliable(0.9), TASKS, kind) == set()


def test_a_lost_task_never_reaches_its_device() -> None:
    ran: list[str] = []
    handlers = {n: noting(ran, n) for n in TASKS}
    transport = UnreliableTransport(InProcessTransport(handlers), 0.3, 0)
    lost = lost_of(transport, dict.fromkeys(TASKS, b""))
    assert set(ran) == set(TASKS) - lost
