"""A real fleet on the loopback whose parts can be killed, hung and cut off.

Server and devices are the commands that a user types. What ends without having been killed here is
a fault of the product; what was killed is started again after a moment, as systemd would do.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.proc import Process, descendants, is_same, kill, listening_ports
from faults.proxy import Network
from fedpeat.config.loading import config_from_dict, config_to_yaml, override
from fedpeat.config.schema import Config
from fedpeat.core.noise import NoiseSource
from fedpeat.experiments.fleet_folder import free_port
from fedpeat.experiments.shards import write_shards
from fedpeat.federated.flower.keys import make_keys
from tiny import save_tiny_llama, tiny_settings, write_corpus

__all__ = ["HIDING", "NUM_ROUNDS", "Command", "Fleet", "Materials", "config_in"]

NUM_ROUNDS = 3
DEADLINE_SECONDS = 60.0
END_SECONDS = 20.0
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # several fleets share two cores
}
HIDING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "": ({}, []),
    "masks": (
        {"federated": {"secure_aggregation": True}},
        ["--federated.secure-aggregation"],
    ),
    "noise": (
        {"privacy": {"example_noise_multiplier": 1.0, "example_clip_norm": 0.1}},
        ["--privacy.example-noise-multiplier", "1"],
    ),
}
"""How updates are hidden: what the server is set to, and what devices insist on."""
ODD_DEVICE = Path(__file__).with_name("odd_device.py")


@dataclass(frozen=True)
class Materials:
    """What all fleets share: a tiny model, a corpus, and what each device owns of it."""

    folder: Path

    @classmethod
    def made_in(cls, folder: Path, num_owners: int = 3) -> Materials:
        """Make them."""
        folder.mkdir(parents=True, exist_ok=True)
        own = cls(folder)
        save_tiny_llama(own.model)
        write_corpus(own.corpus, num_owners=num_owners)
        write_shards(config_in(own, folder / "runs"), folder / "shards")
        return own

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.jsonl"

    def shard(self, name: str) -> Path:
        """Return the data of a device."""
        return self.folder / "shards" / f"{name}.jsonl"


def config_in(
    materials: Materials,
    output_dir: Path,
    num_rounds: int = NUM_ROUNDS,
    hiding: str = "",
    **fleet: Any,
) -> Config:
    """Return the settings of a run."""
    settings = tiny_settings(materials.model, materials.corpus, output_dir)
    settings["federated"] = {
        "num_rounds": num_rounds,
        "round_deadline_seconds": DEADLINE_SECONDS,
        "min_clients": 2,  # the server and a device at least
    }
    settings["num_threads"] = 1
    config = config_from_dict({**settings, "fleet": fleet} if fleet else settings)
    return override(config, HIDING[hiding][0])


@dataclass
class Command:
    """A command that is kept running.

    Attributes:
        name: What it is called, and its log.
        arguments: After "fedpeat" or the program of an odd device.
        log: What it says.
    """

    name: str
    arguments: list[str]
    log: Path
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "fedpeat"])
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    was_killed: bool = False
    num_starts: int = 0

    def start(self, more: tuple[str, ...] = ()) -> None:
        """Start it."""
        self.num_starts += 1
        self.was_killed = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, *self.arguments, *more],
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def ended(self) -> int | None:
        """How it ended; None if it runs, or has not been started."""
        return None if self.process is None else self.process.poll()

    def tree(self) -> list[Process]:
        """Return its processes, those that it started included."""
        if self.process is None or self.process.poll() is not None:
            return []
        return descendants(self.process.pid)


class Fleet:
    """One server and some devices.

    Args:
        materials: Model and data.
        folder: Where everything of this fleet goes.
        names: Devices that have a key.
        wait_for: How many the server waits for.
        num_rounds: Rounds of the run.
        hiding: How updates are hidden, one of HIDING.
    """

    def __init__(
        self,
        materials: Materials,
        folder: Path,
        names: list[str],
        wait_for: int,
        num_rounds: int = NUM_ROUNDS,
        hiding: str = "",
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self._materials, self._hiding = folder, materials, hiding
        make_keys(folder / "keys", ["localhost", "127.0.0.1"], names, 2)
        self.port = free_port()
        self.network = Network(self.port)
        self.config = config_in(
            materials,
            folder / "runs",
            num_rounds,
            hiding,
            keys=str(folder / "keys/server"),
            port=self.port,
            wait_for=wait_for,
        )
        settings = folder / "run.yaml"
        settings.write_text(config_to_yaml(self.config))
        self.server = Command("server", ["serve", str(settings)], folder / "server.log")
        self.devices: dict[str, Command] = {}
        self.seen: set[Process] = set()

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / self.config.name

    def join(self, name: str, oddity: str = "") -> None:
        """Start a device."""
        keys = self.folder / "keys/devices" / name
        if self._hiding == "noise":
            self._give_noise(name)
        arguments = ["join", "--server", f"localhost:{self.network.port}", "--keys", str(keys)]
        arguments += ["--data", str(self._materials.shard(name))]
        arguments += ["--folder", str(self.folder / name), "--num-threads", "1"]
        arguments += HIDING[self._hiding][1]
        device = Command(name, arguments, self.folder / f"{name}.log")
        if oddity:
            told = str(self.folder / f"{name}.told")
            device.program = [sys.executable, str(ODD_DEVICE), oddity, told]
        self.devices[name] = device
        device.start()

    def _give_noise(self, name: str) -> None:
        """Let a device draw the noise of the seed, which a run in process can draw as well."""
        own = self.folder / name
        own.mkdir(exist_ok=True)
        noise = NoiseSource.of_seed(self.config.seed).child("device", name)
        (own / "noise.key").write_bytes(noise.key)

    def look(self) -> None:
        """Start again what was killed and is due; remember every process that there was.

        Raises:
            AssertionError: If something ended that nobody had killed.
        """
        now = time.monotonic()
        for command in [self.server, *self.devices.values()]:
            self.seen.update(command.tree())
            if command.process is None or (ended := command.ended) is None:
                continue
            if command is self.server and ended == 0:
                continue
            if not command.was_killed:
                raise AssertionError(f"{command.name} ended with {ended}: {_tail(command.log)}")
            if now >= command.start_at:
                command.start(("--resume",) if command is self.server else ())

    def kill(self, command: Command, role: str, restart_seconds: float) -> bool:
        """Kill one program of a command, by its role; return whether it was there.

        The role "all" is the command with everything that it started, "itself" the command alone.
        """
        tree = command.tree()
        if role == "all":
            victims = tree
        elif role == "itself":
            victims = tree[:1]
        else:
            victims = [process for process in tree if process.role == role][:1]
        if victims and role in {"all", "itself"}:
            command.was_killed = True
            command.start_at = time.monotonic() + restart_seconds
        for process in victims:
            kill(process)
        return bool(victims)

    def hang(self, name: str, *, stopped: bool) -> None:
        """Stop all processes of a device, or let them go on."""
        for process in self.devices[name].tree():
            kill(process, signal.SIGSTOP if stopped else signal.SIGCONT)

    def make_room(self, name: str) -> None:
        """End the shortage of disk of a device."""
        process = self.devices[name].process
        if process is not None and process.poll() is None:
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def history(self) -> list[dict[str, Any]]:
        """Return the rounds that metrics.jsonl or the newest checkpoint has, whichever has more."""
        found: list[dict[str, Any]] = []
        try:
            lines = (self.run_folder / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            pass
        for path in sorted((self.run_folder / "checkpoints").glob("round-*/state.json")):
            try:
                saved: Mapping[str, Any] = json.loads(path.read_text())["state"]
            except (OSError, ValueError):
                continue
            if len(saved["history"]) > len(found):
                found = list(saved["history"])
        return found

    def end(self) -> list[str]:
        """End everything politely; return what did not go away with it."""
        for command in self.devices.values():
            self.hang(command.name, stopped=False)
        for command in [*self.devices.values(), self.server]:
            if command.process is not None and command.process.poll() is None:
                command.process.terminate()
        for command in [*self.devices.values(), self.server]:
            if command.process is not None:
                try:
                    command.process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    command.process.kill()
                    command.process.wait()
        self.network.close()
        time.sleep(1.0)  # whoever watches its parent does so a few times a second
        left = [f"{process.role or 'process'} {process.pid}" for process in self._left()]
        if self.port in listening_ports():
            left.append(f"a listener on port {self.port}")
        for process in self._left():
            kill(process)
        return left

    def _left(self) -> list[Process]:
        return [process for process in self.seen if is_same(process)]


def _tail(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-3:])[-600:]
