"""Start a server and two devices as containers, by compose.yaml, and wait for a run to end.

Each side gets the compose file, an etc folder and an address as on a machine of its own. A run of
two rounds must end, and the devices must end politely when told to. Needs docker with its compose
and the image; as root, since files are given to the containers' user.

    docker build -f deploy/container/Dockerfile -t fedpeat .
    python scripts/rehearse_containers.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from rehearsal import DEVICES, ROOT, TIME_OUT_SECONDS, all_ended_well, prepare_run

COMPOSE = ROOT / "deploy" / "container" / "compose.yaml"
NETWORK = "fedpeat-rehearsal"
HOST = "server.example.org"
PORT = 8443
USER_ID = 10001


def main() -> None:
    """Rehearse, and end with 0 if all went well."""
    if os.geteuid() != 0:
        sys.exit("rehearsing needs root, to give files to the containers' user")
    docker("image", "inspect", "fedpeat")
    docker("network", "create", NETWORK)
    with tempfile.TemporaryDirectory() as folder:
        sides = prepare(Path(folder))
        try:
            rehearse(sides)
        finally:
            for name, side in sides.items():
                compose(name, side, "down", "--volumes", "--timeout", "5")
            docker("network", "rm", NETWORK)


def prepare(folder: Path) -> dict[str, Path]:
    """Make keys, settings and data; return the folder of each side."""
    prepare_run(folder, PORT, HOST)
    sides = {}
    for name in ("server", *DEVICES):
        kind = "server" if name == "server" else "device"
        own = folder / name
        keys = folder / "keys" / (kind if kind == "server" else f"devices/{name}")
        shutil.copytree(keys, own / "etc" / kind)
        if kind == "server":
            shutil.copy(folder / "server.yaml", own / "etc")
        else:
            (own / "data").mkdir()
            shutil.copy(folder / "shards" / f"{name}.jsonl", own / "data")
        shutil.copy(COMPOSE, own)
        (own / "override.yaml").write_text(yaml.safe_dump(override(kind, name)))
        for path in own.rglob("*"):
            os.chown(path, USER_ID, USER_ID)
        sides[name] = own
    return sides


def override(kind: str, name: str) -> dict[str, Any]:
    """Return what makes one machine of many: a volume and a network address for each."""
    given = yaml.safe_load(COMPOSE.read_text())["services"][kind]["command"]
    service = {
        "networks": {"default": {"aliases": [HOST if kind == "server" else name]}},
        "environment": {"OMP_NUM_THREADS": "1"},
        "command": given + (["--num-threads", "1"] if kind == "device" else []),
    }
    return {
        "services": {kind: service},
        "networks": {"default": {"name": NETWORK, "external": True}},
        "volumes": {f"{kind}-state": {"name": f"{NETWORK}-{name}"}},
    }


def rehearse(sides: dict[str, Path]) -> None:
    """Start all sides and see the run to its end."""
    begun = time.monotonic()
    for name, side in sides.items():
        compose(name, side, "up", "--no-build", "--detach")
    server, *devices = [container(name, side) for name, side in sides.items()]
    while (state := inspected(server)["State"])["Running"]:
        if time.monotonic() - begun > TIME_OUT_SECONDS:
            print(docker("logs", server))
            sys.exit(f"the run did not end in {TIME_OUT_SECONDS:g} s")
        time.sleep(1)
    print(f"the server ended with {state['ExitCode']} after {time.monotonic() - begun:.0f} s")
    for number in devices:
        print(
            f"a device may write to {writable(number)}, and has capabilities {capabilities(number)}"
        )
        docker("stop", "--time", "30", number)
    codes = [inspected(number)["State"]["ExitCode"] for number in devices]
    print(f"the devices, told to end, ended with {codes}")
    if not all_ended_well(state["ExitCode"], codes):
        for number in (server, *devices):
            print(docker("logs", number))
        sys.exit("the rehearsal failed")


def writable(number: str) -> str:
    """Return which folders of a container its user can write to."""
    look = (
        "for d in / /etc /opt /usr /var /var/lib/fedpeat /tmp; do test -w $d && echo $d; done; true"
    )
    return ", ".join(docker("exec", number, "sh", "-c", look).split())


def capabilities(number: str) -> str:
    """Return the capabilities that a container's processes may ever have."""
    status = docker("exec", number, "cat", "/proc/self/status")
    (line,) = [line for line in status.splitlines() if line.startswith("CapBnd")]
    return line.split()[1]


def container(name: str, side: Path) -> str:
    """Return the number of the one container of a side."""
    return compose(name, side, "ps", "--quiet").strip()


def inspected(number: str) -> dict[str, Any]:
    """Return what docker knows of a container."""
    found: list[dict[str, Any]] = json.loads(docker("inspect", number))
    return found[0]


def compose(name: str, side: Path, *arguments: str) -> str:
    """Run docker compose for a side."""
    kind = "server" if name == "server" else "device"
    files = ["-f", "compose.yaml", "-f", "override.yaml", "-p", f"{NETWORK}-{name}"]
    more = {"FEDPEAT_SERVER": f"{HOST}:{PORT}", "COMPOSE_PROFILES": kind}
    return called([*compose_command(), *files, *arguments], side, {**os.environ, **more})


def compose_command() -> list[str]:
    """Return how docker compose is called here."""
    found = shutil.which("docker-compose")
    return [found] if found else ["docker", "compose"]


def docker(*arguments: str) -> str:
    """Run docker."""
    return called(["docker", *arguments], ROOT, dict(os.environ))


def called(command: list[str], folder: Path, env: dict[str, str]) -> str:
    """Return what a command prints; end if it fails."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {(done.stderr or done.stdout)[-1000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
