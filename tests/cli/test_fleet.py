"""Whatever is wrong with a fleet's commands ends in one clear line where the person sits."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="a fleet needs Flower")

from cli.conftest import ConfigFile, Refused
from fedpeat.cli.main import main
from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments import join as joining
from fedpeat.federated.flower import keys
from fedpeat.federated.flower.keys import make_keys

DEADLINE = {"round_deadline_seconds": 60}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["localhost", "127.0.0.1"], ["client-00", "client-01"])
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """A port in use, by somebody who does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield int(listening.getsockname()[1])


@pytest.fixture
def device(made: Path) -> Path:
    return made / "devices" / "client-00"


class LastYear(datetime):
    """A clock that is four hundred days slow."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        del tz
        return datetime.now(UTC) - timedelta(days=400)


@pytest.fixture
def expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patched:
        patched.setattr(keys, "datetime", LastYear)
        make_keys(tmp_path / "expired", ["localhost"], ["client-00"])
    return tmp_path / "expired"


# --- keys and shards -----------------------------------------------------------------------------


def test_keys_are_made_and_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", str(tmp_path / "k"), "--devices", "a", "b"])
    assert capsys.readouterr().out.splitlines()[0] == "2 new devices: a, b"
    main(["keys", str(tmp_path / "k"), "--devices", "b", "c"])
    assert capsys.readouterr().out.splitlines()[0] == "1 new devices: c"
    assert (tmp_path / "k" / "devices" / "c" / "device.key").exists()


def test_keys_that_cannot_be(refused: Refused, tmp_path: Path) -> None:
    assert "got 'a/b'" in refused("keys", tmp_path / "k", "--devices", "a/b")
    assert refused("keys", tmp_path / "k", "--days", "0").endswith("at least 1 day, got 0")
    (tmp_path / "file").write_text("")
    refused("keys", tmp_path / "file" / "k", exit_code=1)


def test_shards_are_what_simulated_devices_have(
    config_file: ConfigFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["shards", str(config_file()), str(tmp_path / "shards")])
    paths = sorted(Path(line) for line in capsys.readouterr().out.splitlines())
    assert [path.name for path in paths] == [f"site-{number}.jsonl" for number in range(4)]
    assert all(path.stat().st_size for path in paths)


# --- serve ---------------------------------------------------------------------------------------


@pytest.fixture
def served(config_file: ConfigFile, made: Path) -> Any:
    """Return a function that writes the settings of a fleet, some changed."""

    def write(*, federated: dict[str, Any] | None = None, **fleet: Any) -> Path:
        places = {"keys": str(made / "server"), **fleet}
        return config_file(federated={**DEADLINE, **(federated or {})}, fleet=places)

    return write


def test_a_server_without_keys(refused: Refused, served: Any, tmp_path: Path) -> None:
    line = refused("serve", served(keys=str(tmp_path / "none")))
    assert line.startswith(f"cannot read certificate {tmp_path / 'none' / 'ca.crt'}: ")


def test_a_server_whose_certificate_has_expired(
    refused: Refused, served: Any, expired: Path
) -> None:
    line = refused("serve", served(keys=str(expired / "server")))
    assert f"{expired / 'server' / 'ca.crt'} must be valid now: it is from " in line


def test_a_port_in_use(refused: Refused, served: Any, port: int) -> None:
    line = refused("serve", served(port=port))
    assert f"fleet.port must be one that nobody uses on 127.0.0.1, got {port}: " in line


def test_a_port_of_the_live_page_in_use(refused: Refused, served: Any, port: int) -> None:
    line = refused("serve", served(status_port=port))
    assert line == f"cannot listen on 127.0.0.1, port {port}: the port is in use; choose another"


def test_an_address_that_is_not_this_machines(refused: Refused, served: Any) -> None:
    assert "got 8443: " in refused("serve", served(host="192.0.2.1"))


def test_a_fleet_without_a_deadline(refused: Refused, served: Any) -> None:
    line = refused("serve", served(federated={"round_deadline_seconds": None}))
    assert line.startswith("federated.round_deadline_seconds must be given for a fleet")


def test_a_method_without_devices(refused: Refused, served: Any) -> None:
    line = refused("serve", served(), "--method", "centralized")
    assert line.startswith("method must be one of ")
    assert line.endswith("on a fleet, got centralized")


def test_noise_that_a_server_cannot_decide_on(refused: Refused, served: Any) -> None:
    line = refused("serve", served(), "--privacy.noise", "seed")
    assert line.startswith("privacy.noise must be secret on a fleet")
    assert line.endswith("got seed")


def test_settings_that_differ_from_those_of_the_run(
    refused: Refused, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = served()
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    shutil.copy(config, folder / "config.yaml")
    monkeypatch.setattr(RunFolder, "has_run", lambda _: True)
    assert "already holds a run; --resume goes on" in refused("serve", config)
    line = refused("serve", config, "--resume", "--local.local-steps", "7", "--fleet.port", "1")
    assert f"cannot resume {folder} with other settings: local.local_steps (2 -> 7)" in line


# --- join ----------------------------------------------------------------------------------------


def joined(refused: Refused, device: Path, *more: object, server: str = "localhost:8443") -> str:
    return refused("join", "--server", server, "--keys", device, "--data", "stdlib", *more)


@pytest.mark.parametrize(
    "server", ["localhost", ":8443", "localhost:", "localhost:0", "localhost:70000", "a:b:c"]
)
def test_a_server_that_is_no_place(refused: Refused, device: Path, server: str) -> None:
    line = joined(refused, device, server=server)
    assert line == f"the server must be HOST:PORT, got '{server}'"


def test_a_device_without_keys(refused: Refused, tmp_path: Path) -> None:
    assert joined(refused, tmp_path).startswith(f"cannot read certificate {tmp_path / 'ca.crt'}: ")


def test_a_device_whose_certificate_has_expired(refused: Refused, expired: Path) -> None:
    line = joined(refused, expired / "devices" / "client-00")
    assert "ca.crt must be valid now: it is from " in line


def test_a_device_with_the_key_of_another(refused: Refused, made: Path, tmp_path: Path) -> None:
    own = shutil.copytree(made / "devices" / "client-00", tmp_path / "own")
    shutil.copy(made / "devices" / "client-01" / "device.key", own / "device.key")
    assert joined(refused, own).endswith(
        f"must be the key of {own / 'device.crt'}, got another one"
    )


def test_a_device_without_data(refused: Refused, device: Path, tmp_path: Path) -> None:
    place = ["--server", "localhost:8443", "--keys", device, "--data"]
    assert "none.jsonl" in refused("join", *place, tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("join", *place, tmp_path / "empty")


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["--local.local-steps", "3"], "local.local_steps"),
        (["--emulator.recipe", "full"], "emulator.recipe"),
        (["--model.name", "gpt2"], "model.name"),
        (["--fleet.port", "1"], "fleet.port"),
        (["--seed", "1"], "seed"),
    ],
)
def test_settings_that_are_not_a_devices_to_make(
    refused: Refused, device: Path, option: list[str], name: str
) -> None:
    line = joined(refused, device, *option)
    assert line.startswith(f"{name} is the run's, which the server decides")


def test_a_device_may_insist_on_masks_and_on_how_many_it_hides_among(
    refused: Refused, device: Path
) -> None:
    own = ["--federated.secure-aggregation", "--federated.secure-min-devices", "5"]
    line = joined(refused, device, *own, "--federated.secure-bits", "20")
    assert line.startswith("federated.secure_bits is the run's, which the server decides")
    assert "federated.secure_aggregation, federated.secure_min_devices" in line


def test_who_answers_is_not_the_server(
    refused: Refused, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(listening: socket.socket) -> None:
        link, _ = listening.accept()
        with link:
            link.recv(1)
            link.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

    monkeypatch.setattr(joining, "end_on_sigterm", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=plain, args=(listening,), daemon=True).start()
        place = f"localhost:{listening.getsockname()[1]}"
        line = joined(refused, device, "--folder", tmp_path / "device", server=place)
    assert line.startswith(f"{place} must be a fedpeat server, which speaks TLS, got ")


def test_a_server_that_is_not_there_yet_is_said_once_and_waited_for(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    reasons = ["Connection refused", "Connection refused", "no such host (unknown)"]

    def knock(host: str, port: int, ca: Path) -> str:
        if not reasons:
            raise KeyboardInterrupt  # enough is seen
        return reasons.pop(0)

    monkeypatch.setattr(joining, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(joining, "knock", knock)
    monkeypatch.setattr(joining, "_KNOCK_SECONDS", 0)
    place = ["--server", "localhost:8443", "--keys", str(device), "--data", "stdlib"]
    with pytest.raises(SystemExit):
        main(["join", *place, "--folder", str(tmp_path / "device")])
    assert capsys.readouterr().out.splitlines() == [
        "no server at localhost:8443: Connection refused; trying on",
        "no server at localhost:8443: no such host (unknown); trying on",
    ]


@pytest.mark.parametrize("command", ["keys", "serve", "join"])
def test_an_installation_without_flower(
    refused: Refused, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "flwr" else find(n))
    options: dict[str, list[object]] = {
        "keys": [tmp_path],
        "serve": ["any.yaml"],
        "join": ["--server", "a:1", "--keys", device, "--data", "x"],
    }
    line = refused(command, *options[command])
    assert line == 'a fleet needs Flower: pip install "fedpeat[flower]"'
