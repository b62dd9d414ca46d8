"""Whether a run is alive is known from its lock, and asking never keeps a run from starting."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from fedpeat.core.run_lock import LOCK_NAME, is_locked, take_lock

HOLD = """
import sys
from pathlib import Path
from fedpeat.core.run_lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_without_a_lock_file_nothing_is_known(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is None


def test_the_lock_is_seen_in_this_process_too(tmp_path: Path) -> None:
    with take_lock(tmp_path):
        assert is_locked(tmp_path) is True
    assert is_locked(tmp_path) is False


def test_a_killed_run_is_not_alive(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_locked(tmp_path) is True
        process.kill()
        process.wait()
        assert is_locked(tmp_path) is False


def test_a_lock_that_is_held_cannot_be_taken(tmp_path: Path) -> None:
    with take_lock(tmp_path), pytest.raises(BlockingIOError):
        take_lock(tmp_path)


def test_a_run_may_begin_while_somebody_asks(tmp_path: Path) -> None:
    with (tmp_path / LOCK_NAME).open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        timer = threading.Timer(0.03, fcntl.flock, (asking, fcntl.LOCK_UN))
        timer.start()
        take_lock(tmp_path).close()
        timer.join()


def test_asking_leaves_no_lock_in_a_process_that_was_forked_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lock(tmp_path).close()
    flock, copies = fcntl.flock, []

    def flock_and_fork(file: IO[bytes], operation: int) -> None:
        flock(file, operation)
        if operation & fcntl.LOCK_SH:
            copies.append(os.dup(file.fileno()))  # what a fork does to every file

    monkeypatch.setattr(fcntl, "flock", flock_and_fork)
    assert is_locked(tmp_path) is False
    take_lock(tmp_path).close()
    os.close(copies[0])
