"""A server and four devices, by the commands of the docs, and what the outside gets of them.

One fleet is started for all tests of this file, which go by its order: three devices have joined
while the outside tries its luck, then the fourth joins and the run goes to its end.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedpeat.config.loading import load_config
from fedpeat.experiments.fleet_folder import free_port
from fedpeat.experiments.run import run
from fedpeat.federated.flower.gate import token_for
from fleet.docs_commands import ROOT, Shell, documented_commands
from fleet.sockets import family_of, listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from Linux's own tables"),
]

PAGE = ROOT / "docs" / "fleet.md"
DEVICES = ["client-00", "client-01", "client-02", "client-03"]
_SECONDS = 900.0  # for one step on a machine that does much else


@dataclass(frozen=True)
class Fleet:
    """A fleet whose last device has not joined yet."""

    folder: Path
    shell: Shell
    port: int
    last_command: str

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def trusting(self) -> ssl.SSLContext:
        """Return what a client needs that knows the certificate of the authority alone."""
        return ssl.create_default_context(cafile=self.folder / "keys/devices/client-00/ca.crt")

    @property
    def superlink(self) -> str:
        ports = json.loads((self.folder / "runs/fleet-fleet/ports.json").read_text())
        return f"https://127.0.0.1:{ports['superlink']}"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run the documented commands up to the last device."""
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copytree(ROOT / "examples", folder / "examples")
    port = free_port()
    shell = Shell(folder, port)
    *commands, last = documented_commands(PAGE)
    try:
        for command in commands:
            shell.run(command)
        shell.until(lambda: "3 of 4 are here" in shell.said("serve-0"), _SECONDS, "joining")
        yield Fleet(folder, shell, port, last)
    finally:
        shell.end()


def key_of(fleet: Fleet, name: str) -> ec.EllipticCurvePrivateKey:
    content = (fleet.folder / "keys" / "devices" / name / "device.key").read_bytes()
    key = serialization.load_ssh_private_key(content, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def as_device(fleet: Fleet, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    return FleetHttpClient(fleet.url, interceptors=[signing], verify=fleet.trusting())


def refusal(call: Callable[[], object]) -> int:
    """Return the status with which a call is refused."""
    with pytest.raises(httpx.HTTPStatusError) as refused:
        call()
    return refused.value.response.status_code


def test_the_commands_are_those_of_a_server_and_four_devices() -> None:
    kinds = [command.split()[1] for command in documented_commands(PAGE)]
    assert kinds == ["keys", "shards", "serve", "join", "join", "join", "join"]


def test_a_program_listens_to_the_outside_at_the_gate_alone(fleet: Fleet) -> None:
    assert listening(family_of(os.getpid())), "the tables of sockets can be read"
    serve = family_of(fleet.shell.background["serve-0"].pid)
    places = listening(serve)
    assert ("127.0.0.1", fleet.port) in places  # fleet.host, as the example has it
    assert {host for host, _ in places} == {"127.0.0.1"}
    assert len(places) == 3, "the gate, the SuperLink and the live page"
    joins = [p.pid for name, p in fleet.shell.background.items() if name.startswith("join")]
    assert {host for pid in joins for host, _ in listening(family_of(pid))} == {"127.0.0.1"}


@pytest.mark.parametrize("call", ["register a key", "submit an app", "take a task token"])
def test_only_the_authoritys_certificate_opens_no_call(fleet: Fleet, call: str) -> None:
    public = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    control = ControlHttpClient(fleet.url, verify=fleet.trusting())
    runtime = RuntimeHttpClient(fleet.url, verify=fleet.trusting())
    calls: dict[str, Callable[[], object]] = {
        "register a key": lambda: control.RegisterNode(RegisterNodeRequest(public_key=public)),
        "submit an app": lambda: control.StartRun(StartRunRequest(fab=Fab(content=b"code"))),
        "take a task token": lambda: runtime.AcquireTask(
            AcquireTaskRequest(supported_task_types=["serverapp", "clientapp"])
        ),
    }
    assert refusal(calls[call]) == 404
    control.close()
    runtime.close()


def test_nobody_gets_a_task_token_without_the_secret_even_on_the_loopback(fleet: Fleet) -> None:
    wanted = AcquireTaskRequest(supported_task_types=["serverapp", "clientapp"])
    background = fleet.shell.background
    joins = [p.pid for name, p in background.items() if name.startswith("join")]
    nodes = [port for pid in joins for _, port in listening(family_of(pid))]
    urls = [fleet.superlink, *(f"http://127.0.0.1:{port}" for port in nodes)]
    assert len(urls) == 4
    for url in urls:
        client = RuntimeHttpClient(url, verify=fleet.trusting())
        assert refusal(lambda client=client: client.AcquireTask(wanted)) == 401  # type: ignore[misc]
        client.close()


def test_a_key_that_is_not_registered_gets_nothing(fleet: Fleet) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(stranger.public_key())
    client = as_device(fleet, stranger)
    assert refusal(lambda: client.ActivateNode(ActivateNodeRequest(public_key=public))) == 412
    asked = RegisterNodeFleetRequest(public_key=public)
    assert refusal(lambda: client.RegisterNode(asked)) == 412
    client.close()


def test_a_device_gets_nothing_with_the_key_of_another(fleet: Fleet) -> None:
    one, other = key_of(fleet, "client-00"), key_of(fleet, "client-01")
    public = public_key_to_bytes(one.public_key())
    thief = as_device(fleet, other)
    assert refusal(lambda: thief.ActivateNode(ActivateNodeRequest(public_key=public))) == 401
    node_id = int(re.findall(r"SuperNode ID: (\d+)", log_of(fleet, "client-00"))[-1])
    pulled = PullMessagesRequest(node=Node(node_id=node_id))
    assert refusal(lambda: thief.PullMessages(pulled)) == 401
    thief.close()
    owner = as_device(fleet, one)
    owner.PullMessages(pulled)  # the same call is answered to the one who may make it
    owner.close()


def log_of(fleet: Fleet, name: str) -> str:
    folder = fleet.folder / "keys" / "devices" / name / "fedpeat-device"
    return (folder / "logs" / "supernode.log").read_text()


def test_a_plain_text_client_is_refused(fleet: Fleet) -> None:
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=10) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in link.recv(4096)


def test_the_live_page_shows_the_run_before_its_first_round(fleet: Fleet) -> None:
    found = re.search(r"live page: (http://127\.0\.0\.1:\d+/)", fleet.shell.said("serve-0"))
    assert found is not None
    with httpx.Client(base_url=found[1]) as client:
        assert client.get("status.json").json()["state"] == "running"
        assert "\nfedpeat_run_" in client.get("metrics").text


def test_a_device_whose_key_is_not_registered_is_told_so(fleet: Fleet) -> None:
    """The authority made the key, but the server was started without it."""
    keys = fleet.folder / "later"
    shutil.copytree(
        fleet.folder / "keys", keys, ignore=shutil.ignore_patterns("fedpeat-device")
    )  # sockets of those that run cannot be copied
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    fedpeat = [sys.executable, "-m", "fedpeat"]
    made = [*fedpeat, "keys", str(keys), "--devices", "client-04"]
    subprocess.run(made, check=True, env=environment, capture_output=True)
    own, data = keys / "devices" / "client-04", fleet.folder / "shards" / "client-03.jsonl"
    place = ["--server", f"localhost:{fleet.port}", "--keys", str(own), "--data", str(data)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*fedpeat, "join", *place], env=environment, stdout=pipe) as process:
        assert process.stdout is not None
        told = next(line for line in iter(process.stdout.readline, b"") if b"ended" in line)
        process.send_signal(signal.SIGTERM)
    assert b"supernode ended with 1; again in" in told
    assert b"Failed to initialize the connection to the SuperLink" in told
    assert not list((own / "fedpeat-device" / "parts").iterdir())


def test_the_run_ends_as_the_same_settings_in_process(fleet: Fleet) -> None:
    parts = fleet.folder / "runs" / "fleet-fleet" / "parts"
    fleet.shell.run(fleet.last_command)
    fleet.shell.until(lambda: names_of(parts), _SECONDS, "the first emulator")
    check_that_parts_need_a_token(fleet, parts)
    serve = fleet.shell.background["serve-0"]
    fleet.shell.until(lambda: serve.poll() is not None, _SECONDS, "the run")
    said = fleet.shell.said("serve-0")
    assert serve.returncode == 0, said
    assert "round 3 of 3: 5 of 5 updates, plug-in perplexity" in said
    assert "report: runs/fleet/report.html" in said

    ours = fleet.folder / "runs" / "fleet"
    config = replace(load_config(ROOT / "examples" / "fleet.yaml"), output_dir=str(fleet.folder))
    config = replace(config, name="in-process")
    expected = run(config)
    summary = json.loads((ours / "summary.json").read_text())
    found, wanted = summary["quality"]["plug_in"], expected["quality"]["plug_in"]
    assert math.log(found) == pytest.approx(math.log(wanted), rel=0.005)
    assert wanted < expected["quality"]["full_zero_shot"]
    name = "adapter/adapter_model.safetensors"  # all devices in all rounds: the same bit for bit
    assert (ours / name).read_bytes() == (fleet.folder / "in-process" / name).read_bytes()


def names_of(parts: Path) -> list[str]:
    return [path.name for path in parts.iterdir() if len(path.name) == 64]


def check_that_parts_need_a_token(fleet: Fleet, parts: Path) -> None:
    sha256 = names_of(parts)[0]
    url, secret = f"{fleet.url}/v1/parts/{sha256}", (parts.parent / "parts.secret").read_bytes()
    with httpx.Client(verify=fleet.trusting()) as client:
        assert client.get(url).status_code == 401
        forged = {"Authorization": f"Bearer {token_for(b'guess', sha256, 2**33)}"}
        assert client.get(url, headers=forged).status_code == 401
        known = {"Authorization": f"Bearer {token_for(secret, sha256, 2**33)}"}
        assert client.get(url, headers=known).status_code == 200


def test_all_ends_on_a_signal(fleet: Fleet) -> None:
    said = {name: fleet.shell.said(name) for name in fleet.shell.background if "join" in name}
    assert all("round 3: tuning" in text for text in said.values())
    pids = {pid for p in fleet.shell.background.values() for pid in family_of(p.pid)}
    ended = fleet.shell.end()
    assert {code for name, code in ended.items() if "join" in name} == {130}
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
