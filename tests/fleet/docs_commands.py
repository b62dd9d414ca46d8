"""The commands of docs/fleet.md, read out of the file and run as a person would."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["ROOT", "Shell", "documented_commands"]

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_END_SECONDS = 60.0
_PORT = 8443  # the one that docs and settings have


def documented_commands(path: Path) -> list[str]:
    """Return the lines of all blocks of bash of a page, in order."""
    blocks = _BLOCK.findall(path.read_text())
    return [line for block in blocks for line in block.splitlines() if line.strip()]


class Shell:
    """Runs commands in a folder, those that end with "&" in the background.

    Args:
        folder: The folder.
        port: What the documented port becomes, as that may be in use here.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self._env = {**os.environ, **threads, "PATH": path}
        self.background: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, command: str) -> None:
        """Run a command; one in the background writes what it says to its log."""
        words = shlex.split(command.replace(f"localhost:{_PORT}", f"localhost:{self._port}"))
        in_background = words[-1] == "&"
        words = words[:-1] if in_background else words
        if words[:2] == ["fedpeat", "serve"]:
            words += ["--fleet.port", str(self._port)]
        if not in_background:
            subprocess.run(words, cwd=self._folder, env=self._env, check=True, timeout=120)
            return
        name = f"{words[1]}-{len(self.background)}"
        with (self._folder / f"{name}.log").open("wb") as log:
            self.background[name] = subprocess.Popen(
                words, cwd=self._folder, env=self._env, stdout=log, stderr=log
            )

    def said(self, name: str) -> str:
        """Return what a command in the background has said so far."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for something that the commands in the background do."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                told = "\n".join(f"{name}: {self.said(name)[-2000:]}" for name in self.background)
                pytest.fail(f"{what} took more than {seconds:g} s\n{told}")
            time.sleep(0.1)

    def end(self) -> dict[str, int]:
        """End what still runs as the system does at a shutdown; return how each ended."""
        for process in self.background.values():
            process.send_signal(signal.SIGTERM)
        for process in self.background.values():
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return {name: process.returncode for name, process in self.background.items()}
