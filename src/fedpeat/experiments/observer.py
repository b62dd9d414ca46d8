"""Who is told how a run goes: the terminal, TensorBoard, a log, or nobody."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX import SummaryWriter

__all__ = ["LogFile", "Observer", "Observers", "Silent", "TensorBoard"]


@runtime_checkable
class Observer(Protocol):
    """Is told what happens; never changes it."""

    def message(self, text: str) -> None:
        """Take one line about what is going on."""

    def progress(self, task: str, done: float, total: float, note: str) -> None:
        """Take the progress of a long step."""

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Take a finished round, as it goes into metrics.jsonl."""


class Silent:
    """Hears everything and says nothing; other observers start from it."""

    def message(self, text: str) -> None:
        """Ignore it."""

    def progress(self, task: str, done: float, total: float, note: str) -> None:
        """Ignore it."""

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Have nothing to close."""


class _Handler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing: a disk too full for the log is reported where results are written."""
        del record


class LogFile(Silent):
    """Writes log.txt, a line per event with its time."""

    def __init__(self, path: Path) -> None:
        self._handler = _Handler(path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._logger = logging.Logger(
            f"fedpeat.{path}"
        )  # its own, so that runs in one process do not mix
        self._logger.addHandler(self._handler)

    def message(self, text: str) -> None:
        """Write it."""
        self._logger.info(text)

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Write a short form of the round."""
        quality = line["quality"] or {}
        refused = [
            f"{p['client_id']} {p['status']} ({p['reason']})"
            for p in line["participants"]
            if p["reason"]
        ]
        self._logger.info(
            "round %d/%d plug_in=%s %s train_loss=%s %s",
            line["server_round"],
            num_rounds,
            quality.get("plug_in"),
            quality.get("metric", ""),
            line["train_loss"],
            "; ".join(refused),
        )

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class TensorBoard(Silent):
    """Writes TensorBoard events.

    Args:
        folder: Where they go.
        first_round: Round that the run goes on from; events of later rounds, left by a killed run,
            are purged.
    """

    def __init__(self, folder: Path, first_round: int) -> None:
        self._writer = SummaryWriter(
            str(folder), purge_step=first_round + 1 if first_round else None
        )

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Write the round's curves."""
        quality = line["quality"] or {}
        scalars = {
            **{f"quality/{name}": value for name, value in quality.items() if name != "metric"},
            "train/loss": line["train_loss"],
            "train/update_norm": line["update_norm"],
            "train/product_error": line["product_error"],
            "cost/bytes_down": line["bytes_down"],
            "cost/bytes_up": line["bytes_up"],
            "cost/round_seconds": line["seconds"],
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, line["server_round"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def message(self, text: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.message(text)

    def progress(self, task: str, done: float, total: float, note: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.progress(task, done, total, note)

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.round(line, num_rounds)
