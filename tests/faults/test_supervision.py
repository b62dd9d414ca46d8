"""What keeps a fleet going: programs started again, a run submitted again."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeClock, FakeDevice, FakeTransport
from faults.proc import descendants, is_same
from fedpeat.config.loading import config_from_dict
from fedpeat.core.errors import AggregationError, ConfigError, FleetError
from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments import fleet, join, serve
from fedpeat.experiments.fleet_folder import FleetFolder, free_port
from fedpeat.federated.flower import node, processes
from fedpeat.federated.flower.keys import make_keys, server_keys
from fedpeat.federated.flower.processes import Program, Supervisor

NOTHING_TO_SAY: Callable[[str], object] = lambda _: None  # noqa: E731
END_SECONDS = 10.0


# --- programs -----------------------------------------------------------------------------------


def test_a_program_that_ends_at_once_waits_twice_as_long_each_time_and_a_minute_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(processes, "time", clock)
    program = Program("ends", [], {}, tmp_path / "log")
    assert [program.wait_after_end() for _ in range(8)] == [2, 4, 8, 16, 32, 64, 64, 64]
    clock.sleep(30)
    assert [program.wait_after_end(), program.wait_after_end()] == [2, 2]  # it lasted


SUPERVISES = """
import os, sys, time
from pathlib import Path
from fedpeat.federated.flower.processes import Program, Supervisor
log = Path(sys.argv[1])
code = "import time; print('up', flush=True); time.sleep(600)"
program = Program("sleeps", [sys.executable, "-c", code], dict(os.environ), log)
supervisor = Supervisor([program], print)
supervisor.look()
while not log.read_text():
    time.sleep(0.01)
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is needed")
def test_programs_end_with_the_process_that_started_them_even_if_it_is_killed(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISES, str(tmp_path / "log")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        program = descendants(process.pid)[-1]
        assert program.pid != process.pid
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not is_same(program))


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + END_SECONDS
    while not holds():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


# --- a SuperNode after another ------------------------------------------------------------------


class Fleets:
    """A server that notes what is asked of it."""

    def __init__(self, folder: Path) -> None:
        make_keys(folder / "keys", ["localhost"], ["site"], 1)
        keys = server_keys(folder / "keys/server")
        self.asked: list[tuple[str, bytes]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys.certificate, keys.key)
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fleets(tmp_path: Path) -> Iterator[Fleets]:
    fleets = Fleets(tmp_path)
    yield fleets
    fleets.close()


@pytest.fixture
def become_a_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[str]]:
    """Return what starts a SuperNode that finds the server at a port, and with what it is run."""
    arguments: list[str] = []

    class Command:
        def load(self) -> Callable[[], object]:
            return lambda: arguments.extend(sys.argv)

    monkeypatch.setattr(node, "entry_points", lambda **_: [Command()])
    monkeypatch.setattr(os, "_exit", lambda _: None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def become(port: int) -> list[str]:
        arguments.clear()
        device = tmp_path / "keys/devices/site"
        files = (f"localhost:{port}", str(device / "ca.crt"), str(device / "device.key"))
        log = str(tmp_path / "supernode.log")
        monkeypatch.setattr(sys, "argv", ["node", log, *files, *SUPERNODE])
        node.main()
        return list(arguments)

    return become


SUPERNODE = ["flower-supernode", "--port"]


def test_a_supernode_that_was_killed_is_said_to_be_gone_before_the_next(
    fleets: Fleets, become_a_node: Callable[[int], list[str]], tmp_path: Path
) -> None:
    ids = (7, 300)  # of an older state of the SuperLink, and the last
    log = "".join(f"\x1b[92mINFO \x1b[0m:      SuperNode ID: {node_id}\n" for node_id in ids)
    (tmp_path / "supernode.log").write_text(f"{log}and more\n")
    assert become_a_node(fleets.port) == SUPERNODE
    assert fleets.asked == [("/v1/fleet/deactivate-node", b"\x08\xac\x02")]  # 300 as a varint


def test_the_first_supernode_tells_nobody(
    fleets: Fleets, become_a_node: Callable[[int], list[str]]
) -> None:
    assert become_a_node(fleets.port) == SUPERNODE
    assert fleets.asked == []


def test_a_supernode_starts_where_nobody_can_be_told(
    fleets: Fleets, become_a_node: Callable[[int], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "supernode.log").write_text("INFO : SuperNode ID: 300\n")
    assert become_a_node(free_port()) == SUPERNODE


def raising(error: BaseException) -> Callable[[], object]:
    def supernode() -> None:
        raise error

    return supernode


@pytest.mark.parametrize(
    ("supernode", "code"),
    [
        (lambda: None, 1),  # as Flower's does when a TLS handshake is cut; it would stay, deaf
        (raising(SystemExit(0)), 0),  # told to end
        (raising(SystemExit(1)), 1),
        (raising(SystemExit("refused")), 1),
        (raising(RuntimeError("broken")), 1),
    ],
)
def test_a_supernode_that_gives_up_ends(supernode: Callable[[], object], code: int) -> None:
    assert node.run(supernode) == code


def test_a_supernode_whose_heartbeat_fails_ends(
    become_a_node: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    become_a_node(free_port())
    monkeypatch.setattr(os, "_exit", codes.append)
    heartbeat = threading.Thread(target=raising(RuntimeError("not recognised")))
    heartbeat.start()
    heartbeat.join()
    assert codes == [1]


def test_a_folder_is_of_one_device_at_a_time(tmp_path: Path) -> None:
    lock = join._taken(tmp_path / "device")  # noqa: SLF001 - what a device does first
    with pytest.raises(ConfigError, match="in use by another device; give each a --folder"):
        join._taken(tmp_path / "device")  # noqa: SLF001
    lock.close()
    join._taken(tmp_path / "device").close()  # noqa: SLF001


# --- a run, submitted ---------------------------------------------------------------------------


class FakeFlower:
    """Answers what ``flwr`` would; time passes while it is waited for."""

    def __init__(self, fleet: FleetFolder) -> None:
        self.fleet = fleet
        self.clock = FakeClock()
        self.submitted: list[float] = []
        self.stopped: list[str] = []
        self.status = "running"
        self.failures: list[str] = []
        self.then: Callable[[], object] = lambda: None

    def flwr(self, _: FleetFolder, arguments: list[str]) -> Any:
        if self.failures:
            raise FleetError(self.failures.pop(0))
        if arguments[0] == "run":
            self.submitted.append(self.clock.monotonic())
            self.then()
            return {"run-id": str(len(self.submitted))}
        if arguments[0] == "stop":
            self.stopped.append(arguments[1])
            raise FleetError("flwr stop failed: it is finished")
        return {"runs": [{"status": self.status}]}

    def end(self, exit_code: int = 0, error: str = "") -> None:
        """Leave word of how the run ended."""
        self.fleet.outcome.write_text(json.dumps({"exit_code": exit_code, "error": error}))


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFlower:
    folder = tmp_path / "run-fleet"
    folder.mkdir()
    flower = FakeFlower(FleetFolder(folder))
    monkeypatch.setattr(serve, "_flwr", flower.flwr)
    monkeypatch.setattr(serve, "time", flower.clock)
    return flower


def see_through(flower: FakeFlower, folder: Path) -> list[str]:
    said: list[str] = []
    serve._see_through(flower.fleet, folder, Supervisor([], said.append), said.append)  # noqa: SLF001
    return said


def test_a_run_is_submitted_once_and_seen_to_its_end(flower: FakeFlower, tmp_path: Path) -> None:
    flower.then = flower.end
    assert see_through(flower, tmp_path / "run") == ["the run is submitted"]
    assert len(flower.submitted) == 1


def test_a_superlink_that_goes_away_meanwhile_is_asked_again(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.failures = ["flwr run failed: unavailable"] * 2
    flower.then = flower.end
    said = see_through(flower, tmp_path / "run")
    assert said == ["flwr run failed: unavailable; trying again"] * 2 + ["the run is submitted"]


def test_a_run_whose_process_died_before_it_said_a_word_is_submitted_again(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.status = "finished:failed"
    flower.then = lambda: flower.end() if len(flower.submitted) == 2 else None
    see_through(flower, tmp_path / "run")
    assert len(flower.submitted) == 2
    assert flower.submitted[1] - flower.submitted[0] < 30  # not two minutes
    assert flower.stopped == ["1"]


def test_a_run_of_a_server_that_was_killed_is_stopped_before_it_is_submitted_again(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.fleet.submitted.write_text(json.dumps({"run_id": "77"}))
    flower.then = flower.end
    see_through(flower, tmp_path / "run")
    assert flower.stopped == ["77"]
    assert json.loads(flower.fleet.submitted.read_text()) == {"run_id": "1"}


def test_a_run_that_takes_long_to_come_up_is_given_two_minutes(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.then = lambda: flower.end() if len(flower.submitted) == 2 else None
    see_through(flower, tmp_path / "run")
    assert 120 <= flower.submitted[1] - flower.submitted[0] < 125


def test_a_run_that_goes_on_from_before_is_not_submitted_again(
    flower: FakeFlower, tmp_path: Path
) -> None:
    run_folder = RunFolder(tmp_path / "run")
    run_folder.create()  # another process holds it

    class Ends(Supervisor):
        def look(self) -> None:
            if flower.clock.monotonic() > 500:
                flower.end()

    serve._see_through(flower.fleet, run_folder.path, Ends([], print), NOTHING_TO_SAY)  # noqa: SLF001
    run_folder.close()
    assert flower.submitted == []


def test_a_run_that_ends_again_and_again_without_a_round_is_given_up(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.status = "finished:failed"
    with pytest.raises(AggregationError, match="ended 5 times without a round"):
        see_through(flower, tmp_path / "run")
    assert len(flower.submitted) == 5


def register(flower: FakeFlower, tmp_path: Path) -> list[str]:
    make_keys(tmp_path / "keys", ["localhost"], ["site"], 1)
    said: list[str] = []
    keys = server_keys(tmp_path / "keys/server")
    serve._register(flower.fleet, keys, Supervisor([], said.append), said.append)  # noqa: SLF001
    return said


def test_a_device_is_registered_again_when_the_superlink_went_away(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.failures = ["flwr supernode failed: unavailable"]
    said = register(flower, tmp_path)
    assert said == [
        "flwr supernode failed: unavailable; trying again",
        "1 devices may join: site",
    ]
    assert json.loads(flower.fleet.registered.read_text()) == ["site"]


def test_a_device_that_was_registered_just_before_a_kill_is_known(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.failures = ["flwr supernode failed: Public key already in use."]
    assert register(flower, tmp_path) == ["1 devices may join: site"]
    assert json.loads(flower.fleet.registered.read_text()) == ["site"]


def test_a_device_that_cannot_be_registered_ends_the_command(
    flower: FakeFlower, tmp_path: Path
) -> None:
    flower.failures = ["flwr supernode failed: no such curve"] * 9
    with pytest.raises(FleetError, match="no such curve"):
        register(flower, tmp_path)


# --- devices, waited for ------------------------------------------------------------------------


class Coming(FakeTransport):
    """Devices of which one more is there each time that is asked."""

    def nodes(self) -> list[str]:
        self.num_asked += 1
        return super().nodes()[: self.num_asked]

    num_asked = 0


def test_a_run_waits_for_all_its_devices_once_and_then_for_those_that_a_round_needs() -> None:
    devices = Coming({name: FakeDevice() for name in ("stranger", "a", "b", "c")})
    waiting = fleet.Patient(devices, "abc", first=2, least=1, say=lambda _: None)
    assert waiting.nodes() == ["a", "b"]
    devices.num_asked = 0
    assert waiting.nodes() == ["a"]


@pytest.mark.parametrize(
    ("min_clients", "changes", "least"),
    [
        (1, {}, 1),
        (3, {}, 2),
        (3, {"server": {"participates": False}}, 3),
        (3, {"data": {"server_ratio": 0.0}}, 3),
    ],
)
def test_with_the_servers_update_one_device_less_is_enough(
    min_clients: int, changes: dict[str, Any], least: int
) -> None:
    config = config_from_dict({"federated": {"min_clients": min_clients}, **changes})
    assert fleet.least_devices(config) == least
