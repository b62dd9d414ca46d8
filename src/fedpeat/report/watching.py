"""Read a run folder again and again while its run goes on, and only what is new in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

import yaml

from fedpeat.core.errors import DataError
from fedpeat.core.run_lock import LOCK_NAME, is_locked
from fedpeat.report.load import load_summary, parse_round, require_run_folder
from fedpeat.report.participation import natural_order
from fedpeat.report.records import METRICS, RoundRecord, RunData, Summary
from fedpeat.report.standing import Life, Stage, Standing, Tally

__all__ = ["RunWatcher"]

T = TypeVar("T")

_FILES: Final = ("config.yaml", "metrics.jsonl", "summary.json", LOCK_NAME)
_REFERENCE: Final = "full_tuned"
_INNER: Final = (_REFERENCE, "clients/*")
_MOST_STAGES: Final = 64
_MOST_CONFIG_BYTES: Final = 1_000_000
_MOST_LOG_BYTES: Final = 4096

NO_METRICS: Final = "There is no metrics.jsonl yet; it is written when the first round ends."
CUT_OFF: Final = (
    "The last line of metrics.jsonl is only half there; it counts once the rest has been written."
)


class RunWatcher:
    """Tells where a run stands as often as it is asked; may be used from many threads.

    Args:
        folder: The run folder, ``runs/NAME``; the run may be going on, be over, or have yet to
            write its first line.
        min_interval_seconds: Files are looked at no more often than this [s].
        must_be_run: Whether the folder has to be that of a run already; else it may come later.

    Raises:
        DataError: If it is no run folder, but must be one.
    """

    def __init__(
        self, folder: Path, *, min_interval_seconds: float = 0.5, must_be_run: bool = True
    ) -> None:
        if must_be_run:
            require_run_folder(folder, _FILES)
        self.folder = folder
        self._interval = min_interval_seconds
        self._lock = threading.Lock()
        self._reader = _RunReader(folder, _INNER)
        self._standing: Standing | None = None
        self._read_at = 0.0

    def standing(self) -> Standing:
        """Return where the run stands, the same object until something has changed.

        What cannot be read at the moment is said in its notes.
        """
        with self._lock:
            now = time.monotonic()
            if self._standing is None or now - self._read_at >= self._interval:
                found = self._reader.read()
                if found != self._standing:
                    self._standing = found
                self._read_at = now
            return self._standing


class _RunReader:
    """One run folder, with what was read of it before."""

    def __init__(self, folder: Path, inner: Sequence[str] = ()) -> None:
        self._folder = folder
        self._patterns = inner
        self._metrics = _MetricsReader(folder / "metrics.jsonl")
        self._summary = _Cached(folder / "summary.json", load_summary)
        self._settings = _Cached(folder / "config.yaml", _load_settings)
        self._log = _Cached(folder / "log.txt", _last_line)
        self._inner: dict[Path, _RunReader] = {}

    def read(self) -> Standing:
        is_held = is_locked(self._folder)  # first, lest a run that ends now looks interrupted
        summary, settings = self._summary.read(), self._settings.read()
        tally = self._metrics.read()
        notes = (self._summary.fault, self._settings.fault, *self._metrics.notes)
        if not self._folder.is_dir():
            notes = (f"There is no folder {self._folder} at the moment.",)
        metric = summary.quality.metric if summary else tally.metric
        inner = {path.name: reader.read() for path, reader in self._inner_readers().items()}
        reference = inner.get(_REFERENCE)
        return Standing(
            run=RunData(
                name=self._folder.resolve().name,
                metric=metric or METRICS[0],
                rounds=tuple(tally.rounds),
                summary=summary,
                reference=reference.run if reference else None,
                notes=tuple(note for note in notes if note),
            ),
            life=_life(summary, is_held=is_held),
            num_rounds=_whole(_at(settings, "federated", "num_rounds")),
            method=_text(_at(settings, "method")),
            model=_text(_at(settings, "model", "name")),
            participants=tuple(
                tally.participants[key] for key in sorted(tally.participants, key=natural_order)
            ),
            accepted=dict(tally.accepted),
            events=tuple(reversed(tally.events)),
            num_warnings=tally.num_warnings,
            sits_out=tally.sits_out,
            set_aside=tally.rounds[-1].set_aside if tally.rounds else (),
            changed_seconds=self._metrics.changed_seconds,
            stages=tuple(_stage(standing) for standing in inner.values()),
            last_log=self._log.read() or "",
        )

    def _inner_readers(self) -> dict[Path, _RunReader]:
        """Return the readers of the runs inside the run, such as that of the upper bound."""
        found = [
            path
            for pattern in self._patterns
            for path in sorted(self._folder.glob(pattern))[:_MOST_STAGES]
            if (path / LOCK_NAME).is_file()
        ]
        self._inner = {path: self._inner.get(path) or _RunReader(path) for path in found}
        return self._inner


class _Cached(Generic[T]):
    """What a file holds, read again only when it has changed; a fault is told, not raised."""

    def __init__(self, path: Path, load: Callable[[Path], T | None]) -> None:
        self._path, self._load = path, load
        self._seen: tuple[int, int, int] | None = None
        self._value: T | None = None
        self.fault = ""

    def read(self) -> T | None:
        seen = _signature(self._path)
        if seen is None or seen != self._seen:
            self._seen, self._value, self.fault = seen, None, ""
            try:
                self._value = self._load(self._path) if seen else None
            except DataError as error:
                self.fault = f"Left out: {error}."
        return self._value


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return what is another when a file was changed or replaced; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _load_settings(path: Path) -> object:
    """Return what config.yaml holds; only a few settings are looked at, and none is needed."""
    try:
        with path.open("rb") as file:
            return yaml.safe_load(file.read(_MOST_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from error


def _last_line(path: Path) -> str:
    """Return the last line that has an end, or nothing."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _MOST_LOG_BYTES, 0))
            whole, _, _ = file.read().rpartition(b"\n")
    except OSError:
        return ""
    return whole.rpartition(b"\n")[2].decode("utf-8", "replace")


def _stage(inner: Standing) -> Stage:
    return Stage(inner.run.name, inner.life, inner.run.last_round)


def _life(summary: Summary | None, *, is_held: bool | None) -> Life:
    if is_held:
        return "running"
    if summary is not None:
        return "finished"
    return "unknown" if is_held is None else "stopped"


def _at(tree: object, *names: str) -> object:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


class _MetricsReader:
    """metrics.jsonl, of which each line is read once as long as the file only grows.

    A run writes the file anew after each round, with the same lines and one more. So the place of
    the last line is remembered, and what it said: where it still stands there, only what comes
    after it is read; else (the run was resumed from an earlier round, or started anew) all is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._forget()
        self.notes: tuple[str, ...] = (NO_METRICS,)
        self.changed_seconds: float | None = None

    def _forget(self) -> None:
        self._tally = Tally()
        self._start, self._last = 0, b""
        self._number = 0
        self._faults: list[str] = []

    def read(self) -> Tally:
        """Return the rounds so far, of which the file had more than before or not."""
        try:
            seen = _signature(self._path)
            if seen is None or seen != self._seen:
                self._take(self._news())
                self._seen = seen
                self.changed_seconds = self._path.stat().st_mtime
        except OSError as error:
            self._forget()
            self._seen = self.changed_seconds = None
            is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            why = f"metrics.jsonl cannot be read: {error.strerror or error}."
            self.notes = (NO_METRICS if is_missing else why,)
        return self._tally

    def _news(self) -> bytes:
        """Return what comes after the last line that was read, or everything."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            if file.read(len(self._last)) != self._last:
                self._forget()
                file.seek(0)
            return file.read()

    def _take(self, content: bytes) -> None:
        """Take lines that are new; a round that is written again makes all be read anew."""
        is_cut_off = False
        found: dict[int, tuple[RoundRecord, str | None]] = {}
        for line, is_last in self._lines(content):
            try:
                record, metric = parse_round(line, f"metrics.jsonl, line {self._number}")
            except DataError as error:
                if is_last:
                    is_cut_off = True
                else:
                    self._faults.append(f"Left out: {error}.")
                continue
            found[record.server_round] = (record, metric)
        if found and min(found) <= self._tally.last_round:
            self._forget()
            self._take(self._path.read_bytes())
            return
        for server_round in sorted(found):
            self._tally.add(*found[server_round])
        self.notes = (*self._faults[:5], *([CUT_OFF] if is_cut_off else []))

    def _lines(self, content: bytes) -> Iterator[tuple[str, bool]]:
        """Yield each line, and whether it is the last and has no end; remember the last whole one.

        A line without an end is not remembered, so that it is read again when it has one.
        """
        place = self._start + len(self._last)
        *whole, rest = content.split(b"\n")
        for line in whole:
            self._number += 1
            self._start, self._last = place, line + b"\n"
            place += len(line) + 1
            if line.strip():
                yield line.decode("utf-8", "replace"), False
        if rest.strip():
            yield rest.decode("utf-8", "replace"), True
