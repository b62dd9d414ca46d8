"""Starts the programs that a server or a device consists of, again whenever one ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Program", "Supervisor", "end_on_sigterm", "environment", "tool"]

# Ends the program when the supervisor dies, however that dies (Linux); then becomes the program.
_LAUNCH = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_GRACE_SECONDS = 5.0
_TAIL_BYTES = 4096
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LAST_WORDS = re.compile(r"Exit Code: \d+\n(.+?)(?:\n\n|\Z)", re.DOTALL)  # at the end of a log
_LASTING_SECONDS = 30.0  # a program that ran as long is well
_MOST_BACK_OFF_SECONDS = 64.0

FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Nothing but the server is called, nothing is installed while it runs."""

FLOWER_DEFAULTS = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
"""What may be set otherwise: a busy machine is spared by asking for tasks less often [s]."""


def tool(name: str) -> str:
    """Return the path of a command of this environment."""
    return str(Path(sys.executable).parent / name)


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of Flower's programs.

    Args:
        home: Where Flower keeps its files.
        more: Further variables.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    fixed = {**FLOWER_ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}
    return {**FLOWER_DEFAULTS, **os.environ, **fixed, **more}


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that it ends its programs first."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@dataclass
class Program:
    """A program that is to run all the time.

    Attributes:
        name: What it is called in messages and by its log.
        command: Path and arguments.
        env: Its environment.
        log: File for what it says.
        back_off_seconds: How long to wait before it is started again [s]; twice as long each time
            that it ends at once.
        takes_along: Programs that wait for ever for what this one had begun: if it ends, what it
            has started is ended, and they are started anew with it.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    back_off_seconds: float = 2.0
    takes_along: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    start_at: float = field(default=0.0, init=False)
    started_at: float = field(default=0.0, init=False)
    num_starts: int = field(default=0, init=False)
    log_start: int = field(default=0, init=False)
    num_failures: int = field(default=0, init=False)

    def wait_after_end(self) -> float:
        """Return how long to wait now that it has ended [s], and count it if it ended at once."""
        lasted = time.monotonic() - self.started_at >= _LASTING_SECONDS
        self.num_failures = 0 if lasted else self.num_failures + 1
        doubled = self.back_off_seconds * 2.0 ** min(max(self.num_failures - 1, 0), 16)
        return max(self.back_off_seconds, min(doubled, _MOST_BACK_OFF_SECONDS))


class Supervisor:
    """Keeps programs running.

    Args:
        programs: The programs, in the order in which they are started.
        say: Is told what happens.
    """

    def __init__(self, programs: Sequence[Program], say: Callable[[str], object]) -> None:
        self._programs = list(programs)
        self._say = say

    def add(self, programs: Sequence[Program]) -> None:
        """Keep further programs running, from the next look on."""
        self._programs += programs

    def look(self) -> None:
        """Start what is not running and is due."""
        for program in self._programs:
            process = program.process
            if process is not None and process.poll() is not None:
                seconds = program.wait_after_end()
                self._say(
                    f"{program.name} ended with {process.returncode}; again in {seconds:g} s"
                    f"{_last_words(program)} (see {program.log})"
                )
                self._end_along(program)
                program.process = None
                program.start_at = time.monotonic() + seconds
            if program.process is None and time.monotonic() >= program.start_at:
                _start(program)

    def _end_along(self, ended: Program) -> None:
        if not ended.takes_along:
            return
        _signal(ended, signal.SIGKILL)  # its processes, which are left without it
        for program in self._programs:
            if program.name in ended.takes_along and program.process is not None:
                _signal(program, signal.SIGKILL)
                program.process.wait()
                program.process, program.start_at = None, time.monotonic()

    def stop(self) -> None:
        """End all programs, the last one first: politely, then by force."""
        running = [p for p in reversed(self._programs) if p.process is not None]
        for program in running:
            _signal(program, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for program in running:
            assert program.process is not None
            with suppress(subprocess.TimeoutExpired):
                program.process.wait(max(0.1, deadline - time.monotonic()))
            _signal(program, signal.SIGKILL)  # and what it started
            program.process.wait()
            program.process = None


def _last_words(program: Program) -> str:
    """Return why a program of Flower ended, as its log says: ": REASON", or nothing."""
    try:
        with program.log.open("rb") as file:
            file.seek(max(program.log_start, program.log.stat().st_size - _TAIL_BYTES))
            text = _COLOURS.sub("", file.read().decode(errors="replace"))
    except OSError:
        return ""
    found = _LAST_WORDS.findall(text)
    return f": {' '.join(found[-1].split())}" if found else ""


def _start(program: Program) -> None:
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with program.log.open("ab") as log:
        program.log_start = log.tell()
        program.process = subprocess.Popen(  # noqa: S603 - our own list of programs
            [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *program.command],
            env=dict(program.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    program.num_starts, program.started_at = program.num_starts + 1, time.monotonic()


def _signal(program: Program, number: int) -> None:
    assert program.process is not None
    with suppress(ProcessLookupError):
        os.killpg(program.process.pid, number)
