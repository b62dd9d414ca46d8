"""What a device was told last, kept on its disk: started again, it goes on as if it had not ended.

Without it the server, which does not ask anew before each round, would lose an update whenever a
device is started again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedpeat.core.errors import FedPEATError
from fedpeat.core.run_folder import write_atomically

__all__ = ["Answers", "Recalling"]

_KEPT = ("welcome", "hold")  # in the order in which they are told


@runtime_checkable
class Answers(Protocol):
    """Whoever answers messages."""

    def handle(self, kind: str, content: bytes) -> bytes:
        """Answer one message."""


class Recalling:
    """A device that keeps the last of each message that later ones build on.

    Args:
        device: The device.
        folder: Where they are kept.
        say: Is told what cannot be kept or recalled.
    """

    def __init__(self, device: Answers, folder: Path, say: Callable[[str], object]) -> None:
        self._device = device
        self._folder = folder
        self._say = say

    def handle(self, kind: str, content: bytes) -> bytes:
        """Answer one message, and keep it if it is to be recalled.

        Raises:
            FedPEATError: If it cannot be answered; the text says why.
        """
        answer = self._device.handle(kind, content)
        if kind in _KEPT:
            try:
                write_atomically(self._folder / f"{kind}.message", content)
            except FedPEATError as error:  # a full disk: it is told again after a restart
                self._say(str(error))
        return answer

    def recall(self) -> None:
        """Be told again what was told last, as far as it is of use still."""
        for kind in _KEPT:
            try:
                self._device.handle(kind, (self._folder / f"{kind}.message").read_bytes())
            except FileNotFoundError:
                return
            except Exception as error:  # noqa: BLE001 - the server will tell it anew
                self._say(f"cannot go on as before: {type(error).__name__}: {error}")
                return
