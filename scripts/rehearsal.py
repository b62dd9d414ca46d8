"""What the rehearsals of deploy/ have in common: the run, its keys and the data of its devices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DEVICES = ["client-00", "client-01"]
TIME_OUT_SECONDS = 600.0
INTERRUPTED = 130  # what a device ends with that is told to end


def prepare_run(folder: Path, port: int, host: str) -> None:
    """Make server.yaml (two rounds), keys and shards/DEVICE.jsonl in a folder.

    Args:
        folder: Where to.
        port: Where the server is to listen.
        host: The name under which devices reach it.
    """
    settings = yaml.safe_load((ROOT / "examples" / "fleet.yaml").read_text())
    settings["data"]["num_clients"] = len(DEVICES)
    settings["federated"]["num_rounds"] = 2
    settings["fleet"] = {"port": port}
    config = folder / "server.yaml"
    config.write_text(yaml.safe_dump(settings))
    fedpeat = BIN / "fedpeat"
    subprocess.run(
        [fedpeat, "keys", folder / "keys", "--hosts", host, "--devices", *DEVICES], check=True
    )
    subprocess.run([fedpeat, "shards", config, folder / "shards"], check=True)


def all_ended_well(server: int, devices: Sequence[int]) -> bool:
    """Return whether the run ended, and each device when it was told to."""
    return server == 0 and list(devices) == [INTERRUPTED] * len(DEVICES)
