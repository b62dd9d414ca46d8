"""What holds a fleet together: whom it waits for, what it says, its folder, page and door."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fakes import FakeClock, FakeDevice, FakeTransport
from fedpeat.config.loading import config_from_dict, config_to_yaml
from fedpeat.config.schema import Config, FleetConfig
from fedpeat.core.errors import ConfigError
from fedpeat.experiments import fleet as experiment
from fedpeat.experiments.fleet import Patient, run_on
from fedpeat.experiments.fleet_folder import FLEET_VARIABLE, FleetFolder, secret_file
from fedpeat.experiments.news import NewsReader, NewsWriter
from fedpeat.experiments.serve import live_page
from fedpeat.federated.flower import keys
from fedpeat.federated.flower.keys import ServerKeys, make_keys, server_keys
from fedpeat.federated.flower.knock import knock
from fleet.doors import keys_in
from tiny import tiny_settings

# --- who is waited for ---------------------------------------------------------------------------


class Arriving(FakeTransport):
    """Devices that arrive one by one, whenever somebody looks."""

    def __init__(self, *names: str) -> None:
        super().__init__({name: FakeDevice() for name in names})
        self.num_looks = 0

    def nodes(self) -> list[str]:
        self.num_looks += 1
        return super().nodes()[: self.num_looks]


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "time", FakeClock())


def test_the_first_round_waits_for_all_and_others_for_the_fewest() -> None:
    inner = Arriving("c", "a", "b")
    said: list[str] = []
    patient = Patient(inner, ["a", "b", "c"], first=3, least=1, say=said.append)
    assert patient.nodes() == ["c", "a", "b"]
    assert said == [
        "waiting for devices, 1 of 3 are here: c",
        "waiting for devices, 2 of 3 are here: a, c",
    ]
    inner.devices = {"b": FakeDevice()}
    assert patient.nodes() == ["b"]


def test_a_device_without_a_key_of_now_does_not_take_part() -> None:
    patient = Patient(Arriving("old", "a"), ["a"], first=1, least=1, say=lambda _: None)
    assert patient.nodes() == ["a"]


def test_tasks_and_replies_pass_through() -> None:
    patient = Patient(FakeTransport({"a": FakeDevice()}), ["a"], 1, 1, print)
    tickets = patient.submit("hello", {"a": b""}, 1.0)
    assert [reply.node for _, reply in patient.poll(tickets)] == ["a"]


# --- what is said --------------------------------------------------------------------------------


def line(**changes: object) -> dict[str, object]:
    participants = [
        {"client_id": "server", "status": "accepted", "reason": ""},
        {"client_id": "ann", "status": "rejected", "reason": "update has NaN"},
        {"client_id": "bob", "status": "late", "reason": ""},
    ]
    quality = {"metric": "perplexity", "plug_in": 17.2989}
    common = {"server_round": 2, "participants": participants, "quality": quality}
    return {**common, "warnings": ["cat sits out: the server runs 2, this device 1"], **changes}


def test_a_round_is_told_with_all_who_did_not_add_to_it(tmp_path: Path) -> None:
    writer, reader = NewsWriter(tmp_path / "news.txt"), NewsReader(tmp_path / "news.txt")
    assert reader.new() == []
    writer.message("reading\n data")
    assert reader.new() == ["reading data"]
    writer.round(line(), num_rounds=4)
    assert reader.new() == [
        "round 2 of 4: 1 of 3 updates, plug-in perplexity 17.3",
        "round 2: ann rejected: update has NaN",
        "round 2: bob late",
        "round 2: cat sits out: the server runs 2, this device 1",
    ]
    writer.round(line(participants=[], quality=None, warnings=[]), num_rounds=4)
    assert reader.new() == ["round 2 of 4: 0 of 0 updates"]


def test_a_line_that_is_half_written_is_told_once_it_is_whole(tmp_path: Path) -> None:
    reader = NewsReader(tmp_path / "news.txt")
    (tmp_path / "news.txt").write_bytes("one\nt\u00fc".encode()[:-1])
    assert reader.new() == ["one"]
    (tmp_path / "news.txt").write_bytes("one\nt\u00fc\n".encode())
    assert reader.new() == ["t\u00fc"]


# --- its folder ----------------------------------------------------------------------------------


def test_a_secret_is_random_lasting_and_for_its_user_alone(tmp_path: Path) -> None:
    one, other = secret_file(tmp_path / "a.secret"), secret_file(tmp_path / "b.secret")
    content = one.read_bytes()
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert len(content) == 64
    assert content != other.read_bytes()
    assert secret_file(one).read_bytes() == content


def test_the_superlink_is_where_it_was_before(tmp_path: Path) -> None:
    port = FleetFolder(tmp_path).superlink_port()
    assert FleetFolder(tmp_path).superlink_port() == port


def test_how_a_run_ended_is_left_for_the_supervisor(
    model_dir: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FleetFolder(tmp_path / "fleet")
    folder.path.mkdir()
    settings = tiny_settings(model_dir, corpus_file, tmp_path / "runs")
    data = {"source": str(tmp_path / "nothing.txt"), "block_size": 16}
    config = config_from_dict({**settings, "data": data})
    folder.config.write_text(config_to_yaml(config))
    folder.devices.write_text(json.dumps(["a"]))
    folder.ca.write_bytes(b"the authority")
    monkeypatch.setenv(FLEET_VARIABLE, str(folder.path))
    run_on(lambda _: FakeTransport({"a": FakeDevice()}))
    outcome = json.loads(folder.outcome.read_text())
    assert outcome["exit_code"] == 2
    assert "nothing.txt" in outcome["error"]
    assert json.loads(folder.process.read_text()) == {"pid": os.getpid()}
    assert NewsReader(folder.news).new()[-1].startswith("reading data ")


# --- its live page -------------------------------------------------------------------------------


def page_of(tmp_path: Path, **changes: object) -> tuple[object, list[str]]:
    said: list[str] = []
    fleet = replace(FleetConfig(), **changes)  # type: ignore[arg-type]
    page = live_page(Config(fleet=fleet), tmp_path / "later", said.append)
    with page:
        pass
    return page, said


def test_the_live_page_is_for_this_machine_alone_unless_told_otherwise(tmp_path: Path) -> None:
    _, said = page_of(tmp_path)
    assert len(said) == 1
    assert said[0].startswith("live page: http://127.0.0.1:")
    assert "token" not in said[0]
    _, said = page_of(tmp_path, status_host="0.0.0.0")  # noqa: S104 - it has a token
    assert "?token=" in said[0]
    assert "not encrypted" in said[1]


def test_the_token_of_the_live_page_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEAT_STATUS_TOKEN", "a-token-of-my-own")
    _, said = page_of(tmp_path, status_host="0.0.0.0")  # noqa: S104 - it has a token
    assert "token=" not in said[0]


def test_there_need_be_no_live_page(tmp_path: Path) -> None:
    assert page_of(tmp_path, status_port=None)[1] == []


# --- who answers the door ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> ServerKeys:
    return keys_in(tmp_path_factory.mktemp("own"))


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """Let somebody answer one call; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            link, _ = listening.accept()
            with link:
                answer(link)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        thread.join(10)


def with_keys(keys: ServerKeys) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.certificate, keys.key)

    def answer(link: socket.socket) -> None:
        try:
            with context.wrap_socket(link, server_side=True) as secure:
                secure.recv(1)
        except OSError:
            pass

    return answer


def test_the_server_itself_is_known(own: ServerKeys) -> None:
    with answering(with_keys(own)) as port:
        assert knock("localhost", port, own.ca) == ""


def test_nobody_there_may_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    assert knock("127.0.0.1", port, Path(ssl.get_default_verify_paths().openssl_cafile))


def test_a_server_of_another_authority_is_refused(own: ServerKeys, tmp_path: Path) -> None:
    other = keys_in(tmp_path)
    with (
        answering(with_keys(other)) as port,
        pytest.raises(ConfigError, match=f"localhost:{port} must have a certificate of the author"),
    ):
        knock("localhost", port, own.ca)


def test_a_server_of_another_name_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path, ["elsewhere.example.org"], ["a"])
    named = server_keys(tmp_path / "server")
    with (
        answering(with_keys(named)) as port,
        pytest.raises(ConfigError, match="has a certificate that does not name localhost"),
    ):
        knock("localhost", port, named.ca)


def test_a_server_whose_certificate_has_expired_is_refused(
    own: ServerKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LongAgo(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            del tz
            return datetime.now(UTC) - timedelta(days=400)

    make_keys(tmp_path, ["localhost"], [], num_days=2000)  # an authority that lasts
    (tmp_path / "server" / "server.key").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(keys, "datetime", LongAgo)
        make_keys(tmp_path, ["localhost"], ["a"])
    folder = tmp_path / "server"
    expired = ServerKeys(folder / "ca.crt", folder / "server.crt", folder / "server.key", {})
    with (
        answering(with_keys(expired)) as port,
        pytest.raises(ConfigError, match=f"localhost:{port} has a certificate that has expired"),
    ):
        knock("localhost", port, expired.ca)


def test_a_connection_that_is_cut_may_pass(own: ServerKeys) -> None:
    with answering(lambda link: link.recv(1)) as port:
        assert knock("localhost", port, own.ca) in {
            "the connection was cut",
            "Connection reset by peer",
        }


def test_a_server_without_tls_is_refused(own: ServerKeys) -> None:
    def plain(link: socket.socket) -> None:
        link.recv(1)
        link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with (
        answering(plain) as port,
        pytest.raises(ConfigError, match="must be a fedpeat server, which speaks TLS"),
    ):
        knock("localhost", port, own.ca)


def test_a_name_that_is_not_known_may_pass(
    own: ServerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    assert knock("nowhere", 1, own.ca) == "no such host (Name or service not known)"
