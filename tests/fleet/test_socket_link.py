"""Pieces over a Unix socket: whole, or an error that says so."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeat.core.errors import WireError
from fedpeat.federated.flower.socket_link import ask, receive, send


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 20_000])
def test_a_piece_comes_as_it_was_sent(
    ends: tuple[socket.socket, socket.socket], content: bytes
) -> None:
    sending = threading.Thread(target=send, args=(ends[0], content))
    sending.start()
    assert receive(ends[1]) == content
    sending.join()


def test_a_piece_that_is_cut_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall((10).to_bytes(8, "big") + b"four")
    ends[0].close()
    with pytest.raises(ConnectionError, match="ended after 4 of 10 bytes"):
        receive(ends[1])


def test_a_length_that_cannot_be_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall((2**63).to_bytes(8, "big"))
    with pytest.raises(ConnectionError, match="at most 17179869184 bytes, got 9223372036854775808"):
        receive(ends[1])


def worker(path: Path, flag: bytes, answer: bytes) -> threading.Thread:
    """Answer one request with what it was, and ``answer``."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        with listening:
            link, _ = listening.accept()
            with link:
                kind, content = receive(link), receive(link)
                send(link, flag)
                send(link, answer + kind + b" " + content)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_question_is_answered(tmp_path: Path) -> None:
    thread = worker(tmp_path / "s", b"1", b"you asked ")
    assert ask(tmp_path / "s", "hello", b"content") == b"you asked hello content"
    thread.join()


def test_a_refusal_carries_its_reason(tmp_path: Path) -> None:
    thread = worker(tmp_path / "s", b"0", b"cannot: ")
    with pytest.raises(WireError, match="^cannot: train x$"):
        ask(tmp_path / "s", "train", b"x")
    thread.join()


def test_a_worker_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask(tmp_path / "nobody", "hello", b"")
