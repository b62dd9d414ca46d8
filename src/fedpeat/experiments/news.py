"""What the process that runs the rounds has to say, for the person who started the server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpeat.experiments.observer import Silent

__all__ = ["NewsReader", "NewsWriter"]


class NewsWriter(Silent):
    """Appends a line to a file for each thing that happens; an observer of runs.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def message(self, text: str) -> None:
        """Write one line; none where the disk is full, which is told where results are written."""
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(" ".join(text.split()) + "\n")

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Write how the round ended, and a line for each device that did not add to it."""
        quality, participants = line["quality"] or {}, line["participants"]
        num_accepted = sum(p["status"] == "accepted" for p in participants)
        score = f", plug-in {quality['metric']} {quality['plug_in']:.4g}" if quality else ""
        number = line["server_round"]
        self.message(
            f"round {number} of {num_rounds}: {num_accepted} of {len(participants)} updates{score}"
        )
        for participant in participants:
            if participant["status"] != "accepted":
                reason = participant["reason"]
                told = f"{participant['client_id']} {participant['status']}"
                self.message(f"round {number}: {told}{reason and ': '}{reason}")
        for warning in line["warnings"]:
            self.message(f"round {number}: {warning}")


class NewsReader:
    """Reads what has been added since the last time.

    Args:
        path: The file; it may come later.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new(self) -> list[str]:
        """Return the lines that are new and whole."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode(errors="replace").splitlines()
