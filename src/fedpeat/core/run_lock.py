"""The lock that a run holds on its folder: one writes, and anybody may ask whether one does.

It is a lock of the kernel's (flock), so that a run that was killed does not hold it any more.
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO, Final

__all__ = ["LOCK_NAME", "is_locked", "take_lock"]

LOCK_NAME: Final = ".lock"
_ATTEMPTS: Final = 5
_PAUSE_SECONDS: Final = 0.02
"""One who asks has the lock for an instant, and a run that begins just then tries again."""


def take_lock(folder: Path) -> IO[str]:
    """Take the lock of a folder; closing the file that is returned gives it back.

    Raises:
        OSError: If another process holds it, or it cannot be made.
    """
    file = (folder / LOCK_NAME).open("w", encoding="utf-8")
    try:
        for _ in range(_ATTEMPTS - 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PAUSE_SECONDS)
            else:
                return file
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def is_locked(folder: Path) -> bool | None:
    """Return whether a process holds the lock of a folder; None if that cannot be known."""
    try:
        file = (folder / LOCK_NAME).open("rb")
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return None
        # by hand: closing would leave it to a process that was forked in between
        fcntl.flock(file, fcntl.LOCK_UN)
    return False
