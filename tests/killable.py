"""A program that runs federations in forks of itself and kills them where it is told to.

One line of JSON in, one out. A fork costs milliseconds; a new process would import PyTorch anew.

    in:   {"args": of the command, "folder": f, "kill_at_event": n, "kill_after_seconds": s}
    out:  {"exit_code": or minus the signal that ended it, "num_events": n, "seconds": s, "stderr"}

An event is a file under the folder being opened, made, renamed or removed. Python's audit hooks
tell of each before it happens, so that every state in which a kill can leave the folder can be had
on purpose.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from typing import IO, Any

import torch

import fedpeat.experiments.run  # noqa: F401 - the command imports it late; forks have it so
from fedpeat.cli.main import main as command

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Counter:
    """Counts events under a folder, in a pipe that outlives the process, and kills it at one."""

    def __init__(self, folder: str, kill_at_event: int | None, report: int) -> None:
        self._folder = folder
        self._kill_at_event = kill_at_event
        self._report = report
        self._count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(self._folder):
            return
        self._count += 1
        os.write(self._report, b".")
        if self._count == self._kill_at_event:
            os.kill(os.getpid(), signal.SIGKILL)


def child(task: dict[str, Any], report: int, errors: IO[bytes]) -> None:
    os.dup2(errors.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    sys.addaudithook(Counter(task["folder"], task.get("kill_at_event"), report))
    try:
        command(task["args"])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(0)


def run(task: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    start = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(task, writing, errors)
        os.close(writing)
        if "kill_after_seconds" in task:
            time.sleep(task["kill_after_seconds"])
            os.kill(pid, signal.SIGKILL)  # a child that is done stays until it is waited for
        with os.fdopen(reading, "rb") as events:
            num_events = len(events.read())
        _, status = os.waitpid(pid, 0)
        errors.seek(0)
        return {
            "exit_code": os.waitstatus_to_exitcode(status),
            "num_events": num_events,
            "seconds": time.monotonic() - start,
            "stderr": errors.read().decode(errors="replace"),
        }


def main() -> None:
    torch.set_num_threads(1)  # threads do not live on in a fork
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)  # noqa: T201 - it is the answer


if __name__ == "__main__":
    main()
