"""What a device does with a message: the same code behind every transport.

Kinds of messages:
    hello  what do you have?   -> client_id, num_examples, num_tokens, held emulators
    hold   here is an emulator -> its hash
    train  tune this adapter   -> the tuned adapter, with losses and number of examples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import EmulatorError, WireError
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.packing import PackedText
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.tuning.local import LocalSettings, train

__all__ = ["EmulatorShelf", "Participant", "fixed_width", "hold_message", "train_message"]

_MAX_SECONDS = 99_999.0  # more than a day


def hold_message(package: EmulatorPackage, adapter: AdapterConfig, tuned: list[int]) -> bytes:
    """Return the message that gives a device an emulator."""
    payload = package.to_payload()
    return encode(
        Payload(
            payload.arrays, {**payload.record, "adapter": asdict(adapter), "tuned_blocks": tuned}
        )
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
) -> bytes:
    """Return the message that asks a device to tune the round's adapter."""
    task = _Task(server_round, emulator, num_steps, first_step, settings, seed)
    return encode(Payload(adapter, asdict(task)))


@dataclass(frozen=True)
class _Task:
    """What a train message asks for; ``train_message`` says the same in bytes."""

    server_round: int
    emulator: str
    num_steps: int
    first_step: int
    settings: LocalSettings
    seed: int


class EmulatorShelf:
    """Emulators in memory, by hash.

    Simulated devices share one shelf, and so one copy of the frozen weights.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._tunables: dict[str, Tunable] = {}

    def put(self, payload: Payload) -> str:
        """Build the emulator in a "hold" message, unless it is here already, and return its hash.

        Raises:
            EmulatorError: If it is damaged.
        """
        package = EmulatorPackage.from_payload(payload)
        sha256 = package.manifest.sha256
        if sha256 not in self._tunables:
            self._tunables[sha256] = self._build(package, payload.record)
        return sha256

    def _build(self, package: EmulatorPackage, record: Mapping[str, Any]) -> Tunable:
        try:
            settings, tuned = dict(record["adapter"]), list(record["tuned_blocks"])
            settings["target_modules"] = tuple(settings["target_modules"])
            config = AdapterConfig(**settings)
        except (KeyError, TypeError, ValueError) as error:
            raise EmulatorError(
                f"hold message has no usable adapter settings: {error!r}"
            ) from error
        model = package.build(self._device, self._dtype)
        manifest = package.manifest
        return attach(model, manifest.blocks, tuned, config, kept=manifest.source_blocks)

    def get(self, sha256: str) -> Tunable:
        """Return an emulator with its adapter.

        Raises:
            EmulatorError: If it is not here.
        """
        if sha256 not in self._tunables:
            raise EmulatorError(f"no emulator {sha256[:12]} here; ask for it with a hold message")
        return self._tunables[sha256]


class Participant:
    """A device: its own text, and the emulators that it holds."""

    def __init__(self, client_id: str, data: PackedText, shelf: EmulatorShelf) -> None:
        self.client_id = client_id
        self._data = data
        self._shelf = shelf
        self._held: set[str] = set()
        self._kinds: dict[str, Callable[[Payload], Payload]] = {
            "hello": self._hello,
            "hold": self._hold,
            "train": self._train,
        }

    @property
    def held(self) -> list[str]:
        """Hashes of the emulators held."""
        return sorted(self._held)

    def restore(self, held: Sequence[str]) -> None:
        """Hold again what a resumed run's device held; the shelf must have it."""
        for sha256 in held:
            self._shelf.get(sha256)
        self._held = set(held)

    def handle(self, kind: str, content: bytes) -> bytes:
        """Answer one message.

        Raises:
            WireError: If the message cannot be understood.
            EmulatorError: If it needs an emulator that is damaged or not held.
        """
        if kind not in self._kinds:
            raise WireError(f"message kind must be one of {', '.join(self._kinds)}, got {kind!r}")
        return encode(self._kinds[kind](decode(content)))

    def _hello(self, payload: Payload) -> Payload:
        del payload
        record = {
            "client_id": self.client_id,
            "num_examples": self._data.num_examples,
            "num_tokens": self._data.num_tokens,
            "held": self.held,
        }
        return Payload(record=record)

    def _hold(self, payload: Payload) -> Payload:
        sha256 = self._shelf.put(payload)
        self._held.add(sha256)
        return Payload(record={"held": sha256})

    def _train(self, payload: Payload) -> Payload:
        task = _read_task(payload.record)
        if task.emulator not in self._held:
            raise EmulatorError(f"{self.client_id} does not hold emulator {task.emulator[:12]}")
        tunable = self._shelf.get(task.emulator)
        tunable.load(payload.arrays)
        stats = train(
            tunable,
            self._data,
            task.settings,
            num_steps=task.num_steps,
            first_step=task.first_step,
            seed=task.seed,
        )
        record = {
            "server_round": task.server_round,
            "emulator": task.emulator,
            "num_examples": self._data.num_examples,
            **asdict(stats),
            "seconds": fixed_width(stats.seconds),
        }
        return Payload(tunable.state(), record)


def fixed_width(seconds: float) -> str:
    """Return a duration as text of one length: bytes must not depend on how fast a device was."""
    return f"{min(seconds, _MAX_SECONDS):012.6f}"


def _read_task(record: Mapping[str, Any]) -> _Task:
    """Return a train task, every part there and of its type."""
    try:
        numbers = [record[key] for key in ("server_round", "num_steps", "first_step", "seed")]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise WireError(f"numbers of a train task must be whole and at least 0, got {numbers}")
        if not isinstance(record["emulator"], str):
            raise WireError(f"emulator must be a hash, got {record['emulator']!r}")
        return _Task(**{**record, "settings": LocalSettings(**record["settings"])})
    except (KeyError, TypeError) as error:
        raise WireError(f"not a train task: {error!r}") from error
