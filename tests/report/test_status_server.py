"""The server shows a run to those who may see it, takes nothing, and cannot be held up."""

from __future__ import annotations

import hmac
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.errors import ConfigError, DataError
from fedpeat.report import status_server
from fedpeat.report.access import Access, make_access
from fedpeat.report.standing import Standing
from fedpeat.report.status_server import PAGES, StatusServer
from report.report_files import MakeRun, round_line, three_rounds

TOKEN = "0123456789-abcdefgh"  # noqa: S105 - of servers that live for one test

Serve = Callable[..., StatusServer]


class Reply:
    """An answer, read whole."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.text = answer.read().decode()


def ask(server: StatusServer, path: str = "/", method: str = "GET", **headers: str) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, headers=named)
        return Reply(connection.getresponse())
    finally:
        connection.close()


def send(server: StatusServer, content: bytes) -> bytes:
    """Send bytes as they are, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def folder(make_run: MakeRun) -> Path:
    return make_run(three_rounds())


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """Start a server on the folder, on any free port; all are stopped in the end."""
    started: list[StatusServer] = []

    def start(**options: Any) -> StatusServer:
        started.append(StatusServer(folder, **({"port": 0} | options)).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that stays as it is."""
    folder = tmp_path_factory.mktemp("still")
    (folder / "config.yaml").write_text("name: demo\n")
    lines = "".join(json.dumps(line) + "\n" for line in three_rounds())
    (folder / "metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def standing(still: Path) -> Iterator[StatusServer]:
    """Serve it to tests that ask and change nothing; to stop a server takes a tenth of a second."""
    with StatusServer(still, port=0, allowed_hosts=["Run.example"]) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(still: Path) -> Iterator[StatusServer]:
    """Serve it to those who have the token."""
    with StatusServer(still, port=0, token=TOKEN) as server:
        yield server


def test_the_page_the_record_and_the_metrics_are_served(serve: Serve) -> None:
    server = serve()
    assert "<h1>Round 2: plug-in perplexity 22.0, from 34.9 before tuning.</h1>" in ask(server).text
    assert json.loads(ask(server, "/status.json").text)["server_round"] == 2
    metrics = ask(server, "/metrics")
    assert "\nfedpeat_run_last_round 2\n" in metrics.text
    assert metrics.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("path", list(PAGES))
def test_head_has_the_headers_of_get_and_no_content(standing: StatusServer, path: str) -> None:
    whole, head = ask(standing, path), ask(standing, path, "HEAD")
    assert (
        send(standing, f"HEAD {path} HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode())[-4:] == b"\r\n\r\n"
    )
    changing = {"Date"}
    assert {k: v for k, v in head.headers.items() if k not in changing} == {
        k: v for k, v in whole.headers.items() if k not in changing
    }
    assert int(head.headers["Content-Length"]) == len(whole.text.encode())


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"]
)
def test_every_other_method_is_not_allowed(standing: StatusServer, method: str) -> None:
    reply = ask(standing, "/", method, Content_Length="0")
    assert reply.status == 405
    assert reply.headers["Allow"] == "GET, HEAD"


def test_an_answer_arrives_though_the_request_has_content(serve: Serve) -> None:
    with socket.create_connection(("127.0.0.1", serve().port), timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n\r\n")
        for _ in range(2):  # a connection that is closed already is reset by the first of these
            time.sleep(0.1)
            connection.sendall(bytes(1000))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/../config.yaml",
        "/%2e%2e/config.yaml",
        "/metrics.jsonl",
        "/metrics/",
        "/status.json/..",
        "/.lock",
        "http://localhost/metrics",
        "file:///etc/passwd",
    ],
)
def test_no_path_leads_to_a_file(standing: StatusServer, path: str) -> None:
    reply = ask(standing, path)
    assert reply.status == 404
    assert reply.text == "there are /, /status.json, /metrics\n"


def test_what_has_not_changed_is_not_sent_again(serve: Serve, folder: Path) -> None:
    server = serve()
    server._watcher._interval = 0.0  # noqa: SLF001
    etag = ask(server).headers["ETag"]
    again = ask(server, If_None_Match=etag)
    assert (again.status, again.text) == (304, "")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(round_line(3, 20.0)) + "\n")
    assert ask(server, If_None_Match=etag).status == 200


def test_a_page_is_made_once_for_all_who_look(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(standing: Standing) -> str:
        made.append(standing.run.last_round)
        return "page"

    monkeypatch.setitem(PAGES, "/", ("text/plain", counted))
    server = serve()
    server._watcher._interval = 0.0  # noqa: SLF001
    for _ in range(3):
        assert ask(server).text == "page"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(round_line(3, None)) + "\n")  # NaN is like no other, itself included
    for _ in range(3):
        assert ask(server).text == "page"
    assert made == [2, 3]


def test_every_answer_has_the_headers_of_a_careful_server(serve: Serve) -> None:
    server = serve(token=TOKEN)
    replies = [
        ask(server, Authorization=f"Bearer {TOKEN}"),
        ask(server),
        ask(server, "/nothing", Authorization=f"Bearer {TOKEN}"),
        ask(server, method="POST"),
        ask(server, Host="evil.example"),
    ]
    assert [reply.status for reply in replies] == [200, 401, 404, 405, 421]
    for reply in replies:
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src")
        assert "unsafe" not in reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["X-Frame-Options"] == "DENY"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert reply.headers["Cache-Control"] == "no-store"
        assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert reply.headers["Server"] == "fedpeat"
        assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8321", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8321", 200),
        ("192.0.2.7", 200),
        ("run.example:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.localhost", 421),
        ("evil-run.example", 421),
        ("", 421),
        ("[evil.example]", 421),
    ],
)
def test_only_its_own_names_are_answered(standing: StatusServer, host: str, status: int) -> None:
    assert ask(standing, Host=host).status == status


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: localhost\r\n"])
def test_a_request_names_one_host(standing: StatusServer, hosts: bytes) -> None:
    assert send(standing, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").startswith(b"HTTP/1.1 400 ")


def test_on_loopback_no_token_is_needed_and_one_that_is_given_counts(serve: Serve) -> None:
    assert serve().token is None
    server = serve(token=TOKEN)
    assert ask(server).status == 401
    assert TOKEN not in server.url


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 401),
        ("/", {"Authorization": f"Bearer {TOKEN}"}, 200),
        ("/", {"Authorization": f"bearer  {TOKEN}"}, 200),
        ("/", {"Authorization": f"Basic {TOKEN}"}, 401),
        ("/", {"Authorization": f"Bearer {TOKEN}x"}, 401),
        ("/", {"Authorization": "Bearer "}, 401),
        ("/", {"Authorization": "Bearer \u00e4\u00f6"}, 401),
        (f"/metrics?token={TOKEN}", {}, 200),
        (f"/metrics?token={TOKEN[:-1]}", {}, 401),
        ("/metrics?token=", {}, 401),
        (f"/metrics?token=wrong&token={TOKEN}", {}, 401),
        (f"/nothing?token={TOKEN}", {}, 404),
        ("/nothing", {}, 401),
        ("/status.json", {"Cookie": f"a=b; COOKIE={TOKEN}"}, 200),
        ("/status.json", {"Cookie": f"fedpeat_1={TOKEN}"}, 401),
        ("/status.json", {"Cookie": 'COOKIE="'}, 401),
    ],
)
def test_who_has_the_token_may_look(
    guarded: StatusServer, path: str, headers: dict[str, str], status: int
) -> None:
    named = {k: v.replace("COOKIE", f"fedpeat_{guarded.port}") for k, v in headers.items()}
    reply = ask(guarded, path, **named)
    assert reply.status == status
    assert TOKEN not in reply.text


def test_a_token_in_the_address_is_kept_in_a_cookie_that_no_script_sees(serve: Serve) -> None:
    server = serve(token=TOKEN)
    cookie = ask(server, f"/?token={TOKEN}").headers["Set-Cookie"]
    assert cookie == f"fedpeat_{server.port}={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
    assert "Set-Cookie" not in ask(server, "/?token=wrong").headers
    assert "Set-Cookie" not in ask(server, Authorization=f"Bearer {TOKEN}").headers


def test_a_token_is_made_up_where_others_can_reach_the_server(serve: Serve) -> None:
    first, second = serve(host="0.0.0.0"), serve(host="0.0.0.0")  # noqa: S104
    assert first.is_open
    assert first.token is not None
    assert len(first.token) >= 43  # 256 bits
    assert first.token != second.token
    assert first.url.endswith(f":{first.port}/?token={first.token}")
    assert ask(first).status == 401
    assert ask(first, f"/?token={first.token}").status == 200


@pytest.mark.parametrize("token", ["", "short", "fifteen-signs--", "blank in the token", "a" * 257])
def test_a_token_that_is_not_safe_is_refused(folder: Path, token: str) -> None:
    with pytest.raises(ConfigError, match=f"the token must be 16 to 256 .*got {len(token)} signs"):
        StatusServer(folder, port=0, token=token)


def test_tokens_are_compared_by_digests_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def watched(given: bytes, token: bytes) -> bool:
        compared.append((len(given), len(token)))
        return given == token

    monkeypatch.setattr(hmac, "compare_digest", watched)
    access: Access = make_access([], TOKEN, needs_token=True)
    assert access.allows(f"Bearer {TOKEN}", "", "x" * 1000)
    assert not access.allows("", "", "")
    assert compared == [(32, 32)] * 6


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"\x16\x03\x01\x00\xa5\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"505"),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /?" + b"a=b&" * 20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 150 + b"\r\n", b"431"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n", b"431"),
    ],
)
def test_rubbish_is_refused_in_few_words(
    standing: StatusServer, content: bytes, status: bytes
) -> None:
    answer = send(standing, content)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"aaaa" not in answer
    assert b"Content-Security-Policy" in answer
    assert ask(standing).status == 200


def test_a_client_that_is_slow_loses_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_server, "_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(status_server, "_DRAIN_SECONDS", 0.1)
    server = serve(max_connections=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        start = time.monotonic()
        slow.sendall(b"GET / HTTP/1.1\r\n")
        ended = False
        while not ended and time.monotonic() - start < 5:  # a byte now and then gives no more time
            try:
                slow.sendall(b"A")
                slow.settimeout(0.05)
                ended = slow.recv(10) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended
        assert 0.2 < time.monotonic() - start < 3
    for _ in range(50):
        if ask(server).status == 200:
            return
        time.sleep(0.05)
    raise AssertionError("its place is not free")


def test_more_clients_than_there_is_room_for_are_told_to_come_again(serve: Serve) -> None:
    server = serve(max_connections=2)
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(2)]
    deadline = time.monotonic() + 5
    try:
        while (reply := ask(server)).status != 503 and time.monotonic() < deadline:
            pass
        assert reply.status == 503
        assert reply.headers["Retry-After"] == "2"
    finally:
        for connection in idle:
            connection.close()
    while (reply := ask(server)).status != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert reply.status == 200


def test_a_port_in_use_is_told_and_free_again_after_stop(folder: Path) -> None:
    with StatusServer(folder, port=0) as server:
        with pytest.raises(
            ConfigError, match=f"cannot listen on 127.0.0.1, port {server.port}: the port is in use"
        ):
            StatusServer(folder, port=server.port)
        assert ask(server).status == 200
    server.stop()
    with StatusServer(folder, port=server.port) as second:
        assert ask(second).status == 200


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("127.0.0.1", 65536, r"the port must be in \[0, 65535\], got 65536"),
        ("127.0.0.1", -1, r"the port must be in \[0, 65535\], got -1"),
        ("nothing.invalid", 0, "cannot listen on nothing.invalid: no such host"),
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1, port 0: "),
        ("a" * 70, 0, "cannot listen on a+: no such host"),
    ],
)
def test_a_place_where_nothing_can_listen_is_one_line(
    folder: Path, host: str, port: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as found:
        StatusServer(folder, host, port)
    assert "\n" not in str(found.value)


def test_a_folder_of_no_run_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a run folder"):
        StatusServer(tmp_path, port=0)


def test_it_goes_on_when_the_run_writes_rubbish(serve: Serve, folder: Path) -> None:
    server = serve()
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe[[[\n{}\n\x00")
    (folder / "summary.json").write_bytes(b"null")
    for path in PAGES:
        assert ask(server, path).status == 200
