"""The folder of a fleet, beside the run's: what the server's programs need to find each other.

runs/NAME-fleet/
  config.yaml      the run's settings
  devices.json     the names of the devices that have a key
  ca.crt           the certificate of the authority that vouches for them
  ports.json       where the SuperLink listens on this machine
  *.secret         random secrets, readable by this user only
  state.db         the SuperLink's own state; it survives a restart
  parts/           parts of emulators that devices may fetch
  app/, home/      what Flower is told to run, and its own files
  logs/            what each program says
  submitted.json   what Flower calls the run that was handed to it last
  process.json     the process that runs the rounds
  bell             touched whenever messages were sent to devices
  news.txt         what it has to say meanwhile
  outcome.json     how that ended
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedpeat.core.run_folder import storage_errors, write_atomically

__all__ = ["FLEET_VARIABLE", "FleetFolder", "free_port", "secret_file"]

FLEET_VARIABLE = "FEDPEAT_FLEET"
_NUM_SECRET_BYTES = 32

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedpeat-fleet"
version = "1.0.0"
description = "Hands messages to fedpeat, which is installed on both sides"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedpeat"

[tool.flwr.app.components]
serverapp = "on_server:app"
clientapp = "on_device:app"

[tool.flwr.app.config]
"""
_ON_SERVER = """\
from fedpeat.experiments.fleet import run_on
from fedpeat.federated.flower.server_app import server_app

app = server_app(run_on)
"""
_ON_DEVICE = """\
from fedpeat.federated.flower.shim import client_app

app = client_app()
"""


@dataclass(frozen=True)
class FleetFolder:
    """Paths in the folder of a fleet."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def devices(self) -> Path:
        return self.path / "devices.json"

    @property
    def ca(self) -> Path:
        return self.path / "ca.crt"

    @property
    def state(self) -> Path:
        return self.path / "state.db"

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def app(self) -> Path:
        return self.path / "app"

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def registered(self) -> Path:
        return self.path / "registered.json"

    @property
    def submitted(self) -> Path:
        return self.path / "submitted.json"

    @property
    def process(self) -> Path:
        return self.path / "process.json"

    @property
    def bell(self) -> Path:
        return self.path / "bell"

    @property
    def news(self) -> Path:
        return self.path / "news.txt"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def parts_secret(self) -> Path:
        return secret_file(self.path / "parts.secret")

    @property
    def tasks_secret(self) -> Path:
        return secret_file(self.path / "tasks.secret")

    def ring(self) -> None:
        """Touch the bell; without it devices look for messages a while later."""
        with suppress(OSError):
            self.bell.touch()

    def log(self, name: str) -> Path:
        """Return the log of a program."""
        return self.path / "logs" / f"{name}.log"

    def superlink_port(self) -> int:
        """Return where the SuperLink listens: where it did before, so that all find it again."""
        path = self.path / "ports.json"
        if not path.exists():
            write_atomically(path, json.dumps({"superlink": free_port()}))
        return int(json.loads(path.read_text())["superlink"])

    def write_app(self) -> None:
        """Write what Flower is told to run: three small files that import fedpeat."""
        with storage_errors(self.app):
            self.app.mkdir(parents=True, exist_ok=True)
            for name, text in (
                ("pyproject.toml", _PROJECT),
                ("on_server.py", _ON_SERVER),
                ("on_device.py", _ON_DEVICE),
            ):
                write_atomically(self.app / name, text)


def secret_file(path: Path) -> Path:
    """Return a file with a random secret, made where there is none; only this user can read it."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return path
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(_NUM_SECRET_BYTES).encode())
    return path


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
