"""What a gate lets in: TLS, the fleet's own calls, parts with a token, and nothing else."""

from __future__ import annotations

import hashlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fedpeat.federated.flower import gate
from fedpeat.federated.flower.gate import token_for
from fleet.doors import Door, keys_in, open_gate

CALL = "/v1/fleet/pull-messages"
PART = b"the bytes of a part" * 100
SHA256 = hashlib.sha256(PART).hexdigest()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("gate")
    keys = keys_in(folder / "keys")
    with open_gate(folder, keys, keys) as door:
        (door.parts / SHA256).write_bytes(PART)
        yield door


@pytest.fixture(autouse=True)
def _forget(door: Door) -> None:
    door.superlink.forget()


@pytest.fixture
def client(door: Door) -> Iterator[httpx.Client]:
    with door.client() as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def soon() -> int:
    return int(time.time()) + 60


def test_a_call_of_the_fleet_and_its_answer_pass_untouched(
    door: Door, client: httpx.Client
) -> None:
    signed = {"flwr-signature": "abc", "content-type": "application/x-protobuf"}
    answer = client.post(CALL, content=b"a message", headers=signed)
    ((method, path, headers, body),) = door.superlink.seen
    assert (method, path, body) == ("POST", CALL, b"a message")
    assert signed.items() <= headers.items()
    assert (answer.status_code, answer.content) == (418, b"answer to a message")
    assert answer.headers["x-flower"] == "yes"


# --- waiting for messages ------------------------------------------------------------------------


@pytest.fixture
def ask(door: Door) -> Iterator[Callable[[], Future[httpx.Response]]]:
    """Ask for messages in a thread; return once the SuperLink has been asked."""
    with door.client() as client, ThreadPoolExecutor() as threads:

        def ask() -> Future[httpx.Response]:
            before = len(door.superlink.seen)
            answer = threads.submit(client.post, CALL, content=b"any?", headers={"flwr-x": "me"})
            until(lambda: len(door.superlink.seen) > before)
            return answer

        yield ask


def until(holds: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something holds; it must."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def ring(door: Door) -> None:
    """Ring, and return once somebody has asked again."""
    before = len(door.superlink.seen)
    Path(door.settings.bell).touch()
    until(lambda: len(door.superlink.seen) > before)


Ask = Callable[[], Future[httpx.Response]]


def test_who_asks_for_messages_waits_until_there_is_one(door: Door, ask: Ask) -> None:
    door.superlink.mailbox = []
    answer = ask()
    ring(door)  # for somebody else
    time.sleep(0.2)
    assert not answer.done()
    door.superlink.mailbox.append(b"a message")
    ring(door)
    assert (answer.result(5).status_code, answer.result().content) == (200, b"a message")
    first, *others = [
        (path, headers["flwr-x"], body) for _, path, headers, body in door.superlink.seen
    ]
    assert first == (CALL, "me", b"any?")
    assert others == [first, first]


def test_a_message_sent_while_the_superlink_answers_is_not_missed(door: Door, ask: Ask) -> None:
    mailbox: list[bytes] = []
    door.superlink.mailbox = mailbox

    def before_answer() -> None:
        if len(door.superlink.seen) == 1:
            Path(door.settings.bell).touch()
            time.sleep(0.2)  # the gate hears it meanwhile
        else:
            mailbox.append(b"a message")

    door.superlink.before_answer = before_answer
    assert ask().result(5).content == b"a message"


def test_who_asks_for_messages_does_not_wait_for_ever(
    door: Door, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_HOLD_SECONDS", 0.3)
    door.superlink.mailbox = []
    start = time.monotonic()
    answer = ask().result(5)
    assert (answer.status_code, answer.content) == (200, b"")
    assert time.monotonic() - start >= 0.3
    assert len(door.superlink.seen) == 1


def test_who_is_refused_does_not_wait(door: Door, ask: Ask) -> None:
    door.superlink.before_answer = lambda: 401
    assert ask().result(5).status_code == 401


def test_who_is_refused_later_is_told_that_there_was_no_message(door: Door, ask: Ask) -> None:
    door.superlink.mailbox = []
    answer = ask()
    door.superlink.before_answer = lambda: 401
    ring(door)
    assert (answer.result(5).status_code, answer.result().content) == (200, b"")


def test_who_waits_is_answered_when_the_gate_closes(tmp_path: Path) -> None:
    keys = keys_in(tmp_path / "keys")
    with ThreadPoolExecutor() as threads:
        with open_gate(tmp_path, keys, keys) as door:
            door.superlink.mailbox = []
            client = door.client()
            once = {"connection": "close"}  # a connection left open is a warning when its loop ends
            answer = threads.submit(client.post, CALL, headers=once)
            until(lambda: door.superlink.seen)
            time.sleep(0.2)
            start = time.monotonic()
        assert (answer.result(5).status_code, answer.result().content) == (200, b"")
        assert time.monotonic() - start < 5
        client.close()


def test_nothing_is_taken_for_who_has_gone(door: Door) -> None:
    door.superlink.mailbox = []
    context = ssl.create_default_context(cafile=door.settings.ca)
    with (
        socket.create_connection(("127.0.0.1", door.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as link,
    ):
        link.sendall(
            f"POST {CALL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()
        )
        until(lambda: door.superlink.seen)
        time.sleep(0.2)
    time.sleep(0.2)
    door.superlink.mailbox.append(b"a message")
    Path(door.settings.bell).touch()
    time.sleep(0.5)
    assert door.superlink.mailbox == [b"a message"]


# --- what else passes ----------------------------------------------------------------------------


def test_health_is_that_of_the_superlink(door: Door, client: httpx.Client) -> None:
    assert client.get("/health").status_code == 418
    assert [(method, path) for method, path, _, _ in door.superlink.seen] == [("GET", "/health")]


@pytest.mark.parametrize(
    "request_line",
    [
        "POST /v1/control/register-node",
        "POST /v1/control/start-run",
        "POST /v1/runtime/acquire-task",
        "GET /docs",
        "GET /openapi.json",
        "GET /",
        "POST /v1/fleet/",
        "POST /v1/fleet",
        "POST /v1/fleet/../control/start-run",
        "POST /v1/fleet/%2e%2e/control/start-run",
        "POST /v1/fleet/..%2fcontrol%2fstart-run",
        "POST /v1%2ffleet/pull-messages",
        "POST /v1/fleet/pull%2dmessages",
        "POST //v1/fleet/pull-messages",
        "POST /v1/fleet/pull-messages/",
        "POST /v1/fleet/pull-messages/more",
        "POST /V1/fleet/pull-messages",
        "POST /v1/fleet/PULL-MESSAGES",
        "POST /v1/fleet/pull-messages;x",
        "POST /v1/fleet/pull_messages",
        "POST https://elsewhere/v1/control/start-run",
        "GET /v1/fleet/pull-messages",
        "PUT /v1/fleet/pull-messages",
        "DELETE /v1/fleet/pull-messages",
        "CONNECT 127.0.0.1:22",
        "POST /health",
        "POST /v1/parts/" + SHA256,
        "PUT /v1/parts/" + SHA256,
        "GET /v1/parts/",
        "GET /v1/parts/../parts.secret",
        "GET /v1/parts/..%2fparts.secret",
        "GET /v1/parts/%2e%2e%2fparts.secret",
    ],
)
def test_nothing_else_is_answered_or_reaches_the_superlink(door: Door, request_line: str) -> None:
    head = f"{request_line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
    answer = door.send(f"{head}Connection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in {b"400", b"401", b"404", b"405"}
    assert b"secret" not in answer
    assert not door.superlink.seen


def test_what_is_no_http_is_refused(door: Door) -> None:
    assert door.send(b"\x00\x01nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert not door.superlink.seen


def test_a_head_that_is_too_long_is_refused(door: Door) -> None:
    head = b"POST /v1/fleet/x HTTP/1.1\r\nHost: localhost\r\nx: " + bytes(100_000)
    assert door.send(head.replace(b"\0", b"x")).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("form", ["whole", "chunked"])
def test_a_body_that_is_too_long_is_refused(
    door: Door, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(gate, "_MAX_BODY_BYTES", 1000)
    longest, longer = bytes(1000), bytes(1001)
    assert client.post(CALL, content=longest).status_code == 418
    content = iter([longer[:600], longer[600:]]) if form == "chunked" else longer
    assert client.post(CALL, content=content).status_code == 413
    assert [len(body) for _, _, _, body in door.superlink.seen] == [1000]


def test_a_part_is_given_for_its_token_whole_or_from_some_byte_on(
    door: Door, client: httpx.Client
) -> None:
    headers = bearer(token_for(door.secret.read_bytes(), SHA256, soon()))
    assert client.get(f"/v1/parts/{SHA256}", headers=headers).content == PART
    rest = client.get(f"/v1/parts/{SHA256}", headers={**headers, "Range": "bytes=1000-"})
    assert (rest.status_code, rest.content) == (206, PART[1000:])


@pytest.mark.parametrize(
    "token",
    [
        "",
        "9" * 12,
        token_for(b"another secret", SHA256, 2**34),
        token_for(b"a secret of the server", "0" * 64, 2**34),
        token_for(b"a secret of the server", SHA256, 1_000_000_000),
        token_for(b"a secret of the server", SHA256, 2**34).replace("1", "2", 1),
        token_for(b"a secret of the server", SHA256, 2**34).rpartition(".")[2],
        f"-1.{token_for(b'a secret of the server', SHA256, -1)}",
        "\u0664.abc",
    ],
    ids="none signature forged other-part expired extended no-expiry negative arabic".split(),
)
def test_a_part_is_not_given_for_another_token(
    door: Door, client: httpx.Client, token: str
) -> None:
    headers = [(b"authorization", f"Bearer {token}".strip().encode())]
    assert client.get(f"/v1/parts/{SHA256}", headers=headers).status_code == 401


def test_only_what_is_called_by_a_hash_is_a_part(door: Door, client: httpx.Client) -> None:
    secret = door.secret.read_bytes()
    for name, status in (("0" * 64, 404), ("parts.secret", 401), (SHA256.upper(), 401)):
        headers = bearer(token_for(secret, name, soon()))
        assert client.get(f"/v1/parts/{name}", headers=headers).status_code == status


def test_a_plain_text_client_gets_no_answer(door: Door) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in link.recv(65536)
    assert not door.superlink.seen


def test_a_client_of_another_authority_sees_that_the_server_is_not_its_own(
    door: Door, tmp_path: Path
) -> None:
    other = keys_in(tmp_path / "other")
    with (
        httpx.Client(verify=ssl.create_default_context(cafile=other.ca)) as client,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.get(f"{door.url}/health")


def test_the_server_is_away_while_another_is_in_the_place_of_its_superlink(
    tmp_path: Path,
) -> None:
    own, other = keys_in(tmp_path / "own"), keys_in(tmp_path / "other")
    with (
        open_gate(tmp_path, own, superlink_keys=other) as door,
        door.client() as client,
    ):
        assert client.post(CALL, content=b"signed").status_code == 503
        assert not door.superlink.seen
