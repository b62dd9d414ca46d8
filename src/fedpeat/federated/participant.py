"""What a device does with a message: the same code behind every transport.

Kinds of messages:
    hello  what do you have?   -> client_id, num_examples, num_tokens, held emulators and parts of
                                  them; which of the parts of the adapter that were asked for
    hold   here is what you lack of an emulator -> its hash
    train  tune this adapter   -> what was tuned of it, with losses and number of examples
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, get_args

import numpy as np

from fedpeat.adapter.lora import Part, part_of
from fedpeat.core.errors import AdapterError, EmulatorError, WireError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.wire import Payload, decode, digest, encode
from fedpeat.data.examples import Examples
from fedpeat.emulator.parts import short
from fedpeat.federated.codecs import UpdateCodec, UpdateEncoder
from fedpeat.federated.screening import shown
from fedpeat.federated.secagg.seam import SecureSide
from fedpeat.federated.secagg.terms import SECURE_KEY, work_digest
from fedpeat.federated.shelf import EmulatorShelf
from fedpeat.tuning.local import LocalSettings, train

__all__ = ["Participant", "fixed_width", "train_message"]

_MAX_SECONDS = 99_999.0  # more than a day
_LARGEST = {  # whole numbers of a task
    "server_round": 2**53,
    "num_steps": 10**6,
    "first_step": 2**53,
    "seed": 2**64,
}
_MAX_BATCH_SIZE = 2**16
_MAX_NUMBER = 1e12
_HASHED_EXAMPLES = 256  # at a time
_NOT_SECURE = (
    "the run has federated.secure_aggregation, this device has not; both sides must set it"
)


def train_message(
    adapter: Mapping[str, Any],
    *,
    server_round: int,
    emulator: str,
    num_steps: int,
    first_step: int,
    settings: LocalSettings,
    seed: int,
    tuned: Part = "all",
    left_out: str = "",
    rank: int | None = None,
    codec: UpdateCodec | None = None,
    secure: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the message that asks a device to tune the round's adapter.

    Args:
        adapter: Its tensors, without the part that is left out.
        server_round: The round.
        emulator: Hash of the emulator to tune it on.
        num_steps: Steps to make.
        first_step: Steps that the device made in earlier rounds.
        settings: How to train.
        seed: Seed of the device's batches and dropout.
        tuned: Part to tune and to send back; the rest stays frozen.
        left_out: Hash of the part that the device has kept; empty if all of the adapter is here.
        rank: Rank of LoRA in ``adapter``; the one that the emulator came with if not given.
        codec: How to send what was tuned; its tensors as they are if not given.
        secure: What secure aggregation has to say; None without it.
    """
    task = _Task(
        server_round,
        emulator,
        num_steps,
        first_step,
        settings,
        seed,
        tuned,
        left_out,
        rank,
        codec or UpdateCodec(),
    )
    record = asdict(task) if secure is None else {**asdict(task), SECURE_KEY: secure}
    return encode(Payload(adapter, record))


@dataclass(frozen=True)
class _Task:
    """What a train message asks for; ``train_message`` says the same in bytes."""

    server_round: int
    emulator: str
    num_steps: int
    first_step: int
    settings: LocalSettings
    seed: int
    tuned: Part
    left_out: str
    rank: int | None
    codec: UpdateCodec


class Participant:
    """A device: its own data, and the emulators that it holds.

    What it holds it knows by hash; the shelf, which simulated devices share, has the tensors.

    Args:
        client_id: Its name.
        data: Its examples.
        shelf: Where emulators are.
        secure: Its side of secure aggregation; it then takes part in no other way, and says of
            itself neither examples nor tokens nor losses.
        noise: What its examples are hidden with; one that nobody else has if not given.
        least_noise: Noise multiplier below which it does not tune; 0 for any.
    """

    def __init__(
        self,
        client_id: str,
        data: Examples,
        shelf: EmulatorShelf,
        secure: SecureSide | None = None,
        *,
        noise: NoiseSource | None = None,
        least_noise: float = 0.0,
    ) -> None:
        self.client_id = client_id
        self._data = data
        self._shelf = shelf
        self._secure = secure
        self._noise = noise or NoiseSource.fresh()
        self._least_noise = least_noise
        self._held: set[str] = set()
        self._parts: set[str] = set()
        self._kept: Mapping[str, np.ndarray] = {}
        self._kept_sha256 = ""
        self._encoder = UpdateEncoder()
        self._kinds: dict[str, Callable[[Payload], Payload]] = {
            "hello": self._hello,
            "hold": self.hold,
            "train": self._train,
            **(secure.kinds if secure is not None else {}),
        }

    @property
    def held(self) -> list[str]:
        """Hashes of the emulators held."""
        return sorted(self._held)

    @property
    def parts(self) -> list[str]:
        """Beginnings of the hashes of the emulators' parts that are held."""
        return sorted(self._parts)

    @property
    def kept(self) -> str:
        """Hash of the part of the adapter that its last task froze; empty for none."""
        return self._kept_sha256

    def inventory(self) -> dict[str, Any]:
        """Return what it holds, as plain data that ``restore`` understands."""
        return {
            "held": self.held,
            "parts": self.parts,
            "kept": self.kept,
            "unsaid_of": self._encoder.key,
        }

    def unsaid(self) -> dict[str, np.ndarray]:
        """Return what its updates left out so far, for ``restore``, by part of the adapter."""
        return dict(self._encoder.residuals)

    def restore(
        self,
        inventory: Mapping[str, Any],
        kept: Mapping[str, np.ndarray],
        unsaid: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Have again what a resumed run's device had; the shelf must have what is still in use."""
        self._held = set(inventory["held"])
        self._parts = set(inventory["parts"])
        self._keep(kept)
        self._encoder = UpdateEncoder(inventory.get("unsaid_of", ""), dict(unsaid or {}))

    def handle(self, kind: str, content: bytes) -> bytes:
        """Answer one message.

        Raises:
            WireError: If the message cannot be understood.
            EmulatorError: If it needs an emulator that is damaged or not held.
            AdapterError: If its adapter does not fit the emulator, or lacks what is not kept here.
        """
        if kind.startswith("secagg_") and self._secure is None:
            raise WireError(_NOT_SECURE)
        if kind not in self._kinds:
            raise WireError(f"message kind must be one of {', '.join(self._kinds)}, got {kind!r}")
        return encode(self._kinds[kind](decode(content)))

    def _hello(self, payload: Payload) -> Payload:
        record: dict[str, Any] = {
            "client_id": self.client_id,
            "held": self.held,
            "emulator_parts": self.parts,
        }
        if self._secure is not None:
            record["secure"] = True
        else:
            record["num_examples"] = self._data.num_examples
            record["num_tokens"] = self._data.num_tokens
        asked = payload.record.get("parts", [])
        if not isinstance(asked, list):
            raise WireError(f"parts must be a list of hashes, got {shown(asked)}")
        if self._kept_sha256 in asked:
            record["kept"] = self._kept_sha256
        return Payload(record=record)

    def hold(self, payload: Payload) -> Payload:
        """Take an emulator, as the message "hold" does, where its parts are already here.

        Raises:
            EmulatorError: If it is damaged, or lacks a part that is not held.
        """
        manifest, current = self._shelf.put(payload, self._parts)
        self._held = {held for held in self._held if short(held) in current} | {manifest.sha256}
        self._parts.update(map(short, manifest.hashes))
        self._parts.intersection_update(current)
        return Payload(record={"held": manifest.sha256})

    def _train(self, payload: Payload) -> Payload:
        record = dict(payload.record)
        secure = record.pop(SECURE_KEY, None)
        task = _read_task(record)
        if task.emulator not in self._held:
            raise EmulatorError(f"{self.client_id} does not hold emulator {task.emulator[:12]}")
        if not task.settings.noise_multiplier >= self._least_noise:  # NaN compares as false
            raise AdapterError(
                f"{self.client_id} tunes with privacy.example_noise_multiplier of at least "
                f"{self._least_noise:g}, got {task.settings.noise_multiplier}"
            )
        tunable = self._shelf.get(task.emulator)
        adapter = self._whole(payload.arrays, task.left_out)
        self._agree(secure, adapter, task)
        tunable.load(adapter, rank=task.rank)
        tuned = part_of(adapter, task.tuned)
        self._keep({name: array for name, array in adapter.items() if name not in tuned})
        with tunable.only(tuned) as part:
            stats = train(
                part,
                self._data,
                task.settings,
                num_steps=task.num_steps,
                first_step=task.first_step,
                seed=task.seed,
                noise=self._noise_of(task, adapter) if task.settings.noise_multiplier else None,
            )
            update = part.state()
        told = {
            "server_round": task.server_round,
            "emulator": task.emulator,
            "seconds": fixed_width(stats.seconds),
        }
        if self._secure is not None:
            masked = self._secure.masked(
                tuned, update, self._data.num_examples, stats.num_tokens, stats.mean_loss or 0.0
            )
            return Payload(masked.arrays, {**masked.record, **told})
        arrays = self._encoder.encode(
            update,
            tuned,
            task.codec,
            key=f"{task.emulator}/{task.rank}",
            part=task.tuned,
            server_round=task.server_round,
        )
        record = {"num_examples": self._data.num_examples, **asdict(stats), **told}
        return Payload(arrays, record)

    def _noise_of(self, task: _Task, adapter: Mapping[str, np.ndarray]) -> NoiseSource:
        """Return the noise of a task: another one whenever anything else is asked, or of others.

        Two updates with the same noise, from other adapters or other examples say, would differ by
        what it hides.
        """
        asked = {**asdict(task), "left_out": digest(adapter), "data": self._data_sha256}
        return self._noise.child("train", json.dumps(asked, sort_keys=True))

    @cached_property
    def _data_sha256(self) -> str:
        whole = hashlib.sha256()
        rows = np.arange(self._data.num_examples)
        for first in range(0, len(rows), _HASHED_EXAMPLES):
            some = rows[first : first + _HASHED_EXAMPLES]
            whole.update(digest(self._data.inputs(some)).encode())
            whole.update(digest({"labels": self._data.labels(some)}).encode())
        return whole.hexdigest()

    def _agree(self, secure: object, adapter: Mapping[str, np.ndarray], task: _Task) -> None:
        """Check that a task is what this device and its neighbours agreed on.

        Raises:
            WireError: If it is not.
        """
        if self._secure is not None:
            work = work_digest(asdict(task))
            self._secure.begin(secure, adapter, task.server_round, task.emulator, work)
        elif secure is not None:
            raise WireError(_NOT_SECURE)

    def _whole(self, arrays: Mapping[str, np.ndarray], left_out: str) -> dict[str, np.ndarray]:
        """Return the adapter with the part that the server left out, since it is kept here."""
        if left_out and left_out != self._kept_sha256:
            raise AdapterError(f"{self.client_id} has not kept part {left_out[:12]} of the adapter")
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise AdapterError(f"adapter tensor {name:.80} must be float32, all of it finite")
        return {**(self._kept if left_out else {}), **arrays}

    def _keep(self, part: Mapping[str, np.ndarray]) -> None:
        self._kept, self._kept_sha256 = part, digest(part) if part else ""


def fixed_width(seconds: float) -> str:
    """Return a duration as text of one length: bytes must not depend on how fast a device was."""
    return f"{min(seconds, _MAX_SECONDS):012.6f}"


def _read_task(record: Mapping[str, Any]) -> _Task:
    """Return a train task, every part there and of its type."""
    try:
        for key, largest in _LARGEST.items():
            _require_whole(key, record[key], 0, largest)
        for key in ("emulator", "left_out"):
            if not isinstance(record[key], str):
                raise WireError(f"{key} must be a hash, got {shown(record[key])}")
        if record["tuned"] not in get_args(Part):
            raise WireError(
                f"tuned must be one of {', '.join(get_args(Part))}, got {shown(record['tuned'])}"
            )
        if record["rank"] is not None:
            _require_whole("rank", record["rank"], 1, _MAX_BATCH_SIZE)
        read = {
            "settings": _read_settings(record["settings"]),
            "codec": UpdateCodec.read(record["codec"]),
        }
        return _Task(**{**record, **read})
    except (KeyError, TypeError) as error:
        raise WireError(f"not a train task: {error!r}") from error


def _read_settings(record: Any) -> LocalSettings:
    """Return how to train, every number in a range that can be computed with."""
    if not isinstance(record, dict) or record.keys() != {f.name for f in fields(LocalSettings)}:
        raise WireError(f"not a train task: settings of another version: {shown(record)}")
    for name, value in record.items():
        if name == "batch_size":
            _require_whole(name, value, 1, _MAX_BATCH_SIZE)
        elif type(value) not in {int, float} or not 0 <= value <= _MAX_NUMBER:
            raise WireError(f"{name} must be a number in [0, {_MAX_NUMBER:g}], got {shown(value)}")
    return LocalSettings(**record)


def _require_whole(key: str, value: object, least: int, largest: int) -> None:
    if type(value) is not int or not least <= value <= largest:
        raise WireError(f"{key} must be a whole number in [{least}, {largest}], got {shown(value)}")
