"""The run folder: what a run leaves behind; a kill leaves the old form of a file or the new one.

runs/NAME/
  config.yaml      the resolved settings
  metrics.jsonl    a line per round
  summary.json     the result, a stable interface
  audit.json       what the emulator gives away, if it was audited
  privacy_audit.json   what an update gives away of the data, if that was audited
  noise.key        what noise is drawn from, if something is hidden; for nobody else to read
  checkpoints/     round-00001/ ...: all that a resumed run needs, with a checksum
  emulator/        the emulator that devices hold, with its manifest
  rungs/           the smaller emulators of a ladder, by name
  adapter/         the best adapter, as a PEFT checkpoint of the full model
  report.html, log.txt, tensorboard/
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeat.core.errors import CheckpointError, ConfigError, StorageError
from fedpeat.core.run_lock import LOCK_NAME, take_lock

__all__ = [
    "Checkpoint",
    "RunFolder",
    "clean_json",
    "kept_secret",
    "replace_folder",
    "sha256_of_file",
    "storage_errors",
    "write_atomically",
]

_KEPT_CHECKPOINTS = 2
_SECRET_BYTES = 32
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_FOLDERS = ("checkpoints", "emulator", "rungs", "adapter", "tensorboard", "full_tuned", "clients")
_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "audit.json",
    "privacy_audit.json",
    "noise.key",
    "report.html",
    "log.txt",
)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one clear error that names the path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def kept_secret(path: Path) -> bytes:
    """Return the secret that a file holds, made at its first use, which this user alone can read.

    Raises:
        CheckpointError: If the file is not one of these.
        StorageError: If it cannot be written or read.
    """
    with storage_errors(path):
        if not path.exists():
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, _NEW_FILE, 0o600), "wb") as file:  # noqa: PTH123
                file.write(os.urandom(_SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise CheckpointError(
            f"{path} must have {_SECRET_BYTES} bytes, got {len(secret)}; remove it to draw "
            "noise from a new one"
        )
    return secret


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that readers, a kill or a full disk see its old content or its new one.

    Raises:
        StorageError: If it cannot be written; the old file is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # a full disk, Ctrl-C: no half a file stays behind
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and move it to ``path`` if all went well; else change nothing.

    Raises:
        StorageError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    with storage_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean_json(value: Any) -> str:
    """Return a line of strict JSON; a number that is not finite becomes null: JSON has no NaN."""

    def finite(item: Any) -> Any:
        if isinstance(item, float):
            return item if np.isfinite(item) else None
        if isinstance(item, Mapping):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, Sequence) and not isinstance(item, str):
            return [finite(inner) for inner in item]
        return item

    return json.dumps(finite(value), allow_nan=False)


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after ``server_round``.

    Attributes:
        server_round: Last finished round; 0 before the first.
        arrays: Adapter, best adapter and server-optimiser state, by name.
        state: Controller state, history of rounds and whatever else is plain data.
    """

    server_round: int
    arrays: Mapping[str, np.ndarray]
    state: Mapping[str, Any]


class RunFolder:
    """Reads and writes one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def create(self) -> None:
        """Make the folder and take its lock, so that two runs never write into one folder.

        Raises:
            StorageError: If it cannot be made, or another process is writing into it.
            ConfigError: If it holds files of somebody else, where a run would put its own.
        """
        self._require_ours()
        with storage_errors(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = take_lock(self.path)
            except BlockingIOError as error:
                raise StorageError(f"{self.path} is in use by another process") from error
        self.settle()

    def _require_ours(self) -> None:
        foreign = [name for name in (*_FOLDERS, *_FILES) if (self.path / name).exists()]
        if foreign and not (self.path / LOCK_NAME).exists() and not self.has_run():
            raise ConfigError(
                f"{self.path} must be a new folder or hold a run, got {', '.join(foreign)} of no "
                "run; choose another name"
            )

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def has_run(self) -> bool:
        """Say whether an earlier run left anything to go on from, or a result."""
        places = ("checkpoints", "full_tuned/checkpoints", "clients/*/checkpoints")
        finished = (self.path / "summary.json").exists()
        return finished or any(any(self.path.glob(f"{place}/round-*")) for place in places)

    def clear(self) -> None:
        """Remove all that an earlier run left; files that fedpeat did not write stay."""
        with storage_errors(self.path):
            for folder in _FOLDERS:
                shutil.rmtree(self.path / folder, ignore_errors=True)
            for file in _FILES:
                (self.path / file).unlink(missing_ok=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def set_aside(self) -> None:
        """Make room for a new run, but keep the old one until the new one has begun."""
        with storage_errors(self.path):
            self._moving.mkdir(exist_ok=True)
            self._move_known(self.path, self._moving)
            self._moving.rename(self._previous)
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def settle(self) -> None:
        """Give up the run that was set aside where a new one has begun, else bring it back.

        A kill at any point of ``set_aside`` or of this leaves what a later call finishes: the old
        run is whole under one name, or partly moved under the other with nothing new beside it.
        """
        with storage_errors(self.path):
            if self._previous.exists():
                if self.has_run():
                    shutil.rmtree(self._previous)
                    return
                self.clear()
                self._previous.rename(self._moving)
            if self._moving.exists():
                with suppress(OSError):
                    self.checkpoints.rmdir()  # made empty for the run that did not begin
                self._move_known(self._moving, self.path)
                shutil.rmtree(self._moving)
                self.checkpoints.mkdir(parents=True, exist_ok=True)

    @property
    def _previous(self) -> Path:
        return self.path / ".previous"

    @property
    def _moving(self) -> Path:
        return self.path / ".previous.moving"

    def _move_known(self, source: Path, target: Path) -> None:
        for name in (*_FOLDERS, *_FILES):
            if (source / name).exists() and not (target / name).exists():
                (source / name).rename(target / name)

    def discard(self) -> None:
        """Remove a run that never began, and the folder itself where nothing else is in it."""
        if self._previous.exists():
            self.settle()
            return
        self.clear()
        with storage_errors(self.path):
            self.checkpoints.rmdir()
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def secret(self) -> bytes:
        """Return the run's secret, made at its first use, which this user alone can read."""
        return kept_secret(self.path / "noise.key")

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl whole: after a resume it holds the rounds that count, no others."""
        write_atomically(
            self.path / "metrics.jsonl", "".join(clean_json(line) + "\n" for line in lines)
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_atomically(
            self.path / "summary.json", json.dumps(json.loads(clean_json(summary)), indent=2) + "\n"
        )

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in one step and drop all but the newest ones.

        Raises:
            StorageError: If it cannot be written; earlier checkpoints are then untouched.
        """
        folder = self.checkpoints / f"round-{checkpoint.server_round:05d}"
        tensors = save({name: np.asarray(a, order="C") for name, a in checkpoint.arrays.items()})
        state = json.dumps(
            {"server_round": checkpoint.server_round, "state": dict(checkpoint.state)}
        ).encode()
        seal = {
            "tensors": hashlib.sha256(tensors).hexdigest(),
            "state": hashlib.sha256(state).hexdigest(),
        }
        with replace_folder(folder) as temporary:
            _write_durably(temporary / "tensors.safetensors", tensors)
            _write_durably(temporary / "state.json", state)
            _write_durably(temporary / "seal.json", json.dumps(seal).encode())
        self.settle()
        for old in self._checkpoint_folders()[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def latest_checkpoint(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None where there is none at all.

        Args:
            warn: Told of each damaged checkpoint that is passed over.

        Raises:
            CheckpointError: If there are checkpoints, but every one is damaged.
        """
        folders = self._checkpoint_folders()
        for folder in reversed(folders):
            try:
                return _read_checkpoint(folder)
            except CheckpointError as error:
                warn(f"{error}; trying the one before")
        if folders:
            raise CheckpointError(
                f"every checkpoint in {self.checkpoints} is damaged; start anew with --overwrite"
            )
        return None

    def _checkpoint_folders(self) -> list[Path]:
        """Return the folders of the checkpoints, oldest first; round 100000 comes after 99999."""
        return sorted(
            self.checkpoints.glob("round-*"), key=lambda path: (len(path.name), path.name)
        )


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_checkpoint(folder: Path) -> Checkpoint:
    try:
        seal = json.loads((folder / "seal.json").read_text())
        tensors, state = (
            (folder / "tensors.safetensors").read_bytes(),
            (folder / "state.json").read_bytes(),
        )
        digests = {
            "tensors": hashlib.sha256(tensors).hexdigest(),
            "state": hashlib.sha256(state).hexdigest(),
        }
        if digests != seal:
            raise CheckpointError(f"checkpoint {folder} is damaged: its checksum does not fit")
        record = json.loads(state)
        return Checkpoint(record["server_round"], load(tensors), record["state"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error
