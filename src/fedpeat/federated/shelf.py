"""The rungs that a federation works with, and the emulators that devices have in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fedpeat.adapter.lora import State
from fedpeat.adapter.slices import Slices, sliced
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import EmulatorError, FedPEATError
from fedpeat.core.wire import Payload, encode
from fedpeat.emulator.package import (
    EmulatorPackage,
    Manifest,
    Memory,
    check_only_own_blocks,
)
from fedpeat.emulator.parts import short

__all__ = ["EmulatorShelf", "Offer", "Rung", "hashes_of"]

Offer = Callable[[Mapping[str, bytes]], Mapping[str, Mapping[str, Any]]]
"""Puts parts where devices can fetch them: parts by hash -> what a device needs for each."""


@dataclass(frozen=True)
class Rung:
    """An emulator as the round loop sees it.

    Attributes:
        sha256: Its hash.
        parts: Its parts by hash.
        hold_record: The rest of the message that hands it out.
        tensors: Names of the adapter's tensors that its network has; None for all of them.
        slices: Entries that it has of the tensors that it has in part. They stay with the server.
        trust: What an example of a device on this rung counts in the average, beside others'.
    """

    sha256: str
    parts: Mapping[str, bytes]
    hold_record: Mapping[str, Any]
    tensors: frozenset[str] | None = None
    slices: Slices = field(default_factory=dict)
    trust: float = 1.0

    @classmethod
    def of(
        cls,
        package: EmulatorPackage,
        adapter: AdapterConfig,
        tuned: Collection[int],
        tensors: frozenset[str] | None = None,
        slices: Slices | None = None,
        trust: float = 1.0,
    ) -> Rung:
        """Return the rung of an emulator.

        Args:
            package: The emulator.
            adapter: What is attached to it.
            tuned: Blocks that are tuned, as in the full model.
            tensors: Names of the adapter's tensors that its network has; None for all of them.
            slices: Entries that it has of those that it has in part.
            trust: What an example of a device on it counts.

        Raises:
            EmulatorError: If there is a tensor of a dropped block in what would be sent.
        """
        check_only_own_blocks(package)
        record = {
            **package.to_payload().record,
            "adapter": asdict(adapter),
            "tuned_blocks": list(tuned),
        }
        return cls(package.manifest.sha256, package.parts, record, tensors, slices or {}, trust)

    def own(self, adapter: State) -> dict[str, np.ndarray]:
        """Return the tensors of an adapter that its network has, and of each the entries."""
        own = {n: a for n, a in adapter.items() if self.tensors is None or n in self.tensors}
        return sliced(own, self.slices)

    def lacking(self, held: Collection[str]) -> frozenset[str]:
        """Return the hashes of the parts that are not among those held."""
        return frozenset(sha256 for sha256 in self.parts if short(sha256) not in held)

    def hold_message(
        self, lacking: Collection[str], current: Iterable[str], offer: Offer | None = None
    ) -> bytes:
        """Return the message that gives a device the emulator.

        Args:
            lacking: Hashes of the parts that the device lacks.
            current: What ``hashes_of`` says of all rungs; a device forgets all else.
            offer: Says how parts can be fetched; they are in the message if there is none.
        """
        if offer is None:
            return encode(self.hold_payload(lacking, current))
        parts = {sha256: part for sha256, part in self.parts.items() if sha256 in lacking}
        record = {**self.hold_payload((), current).record, "fetch": dict(offer(parts))}
        return encode(Payload(record=record))

    def hold_payload(self, lacking: Collection[str], current: Iterable[str]) -> Payload:
        """Return what ``hold_message`` says, for a shelf in this process: no part is copied."""
        parts = {sha256: part for sha256, part in self.parts.items() if sha256 in lacking}
        arrays = {sha256: np.frombuffer(content, np.uint8) for sha256, content in parts.items()}
        return Payload(arrays, {**self.hold_record, "current": list(current)})


def hashes_of(rungs: Iterable[Rung]) -> list[str]:
    """Return the beginnings of the hashes of some rungs and of all their parts."""
    return sorted({short(sha256) for rung in rungs for sha256 in (rung.sha256, *rung.parts)})


class EmulatorShelf:
    """Emulators in memory, by hash.

    Simulated devices share one shelf, and so one copy of the frozen weights: a part that several
    emulators have is in memory once.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._memory: Memory = {}
        self._tunables: dict[str, Tunable] = {}

    def put(self, payload: Payload, held: Collection[str] = ()) -> tuple[Manifest, set[str]]:
        """Build the emulator in a "hold" message, unless it is here already.

        Args:
            payload: The message.
            held: Beginnings of the hashes of parts that need not be in it.

        Returns:
            Its manifest, and the beginnings of the hashes of all emulators and parts that are
            still in use; others are forgotten.

        Raises:
            EmulatorError: If it is damaged, or lacks a part that is not held.
        """
        package = EmulatorPackage.from_payload(payload)
        here = {short(sha256) for sha256 in self._memory}
        if lacking := package.lacking(here.intersection(held)):
            raise EmulatorError(
                f"emulator {package.manifest.sha256[:12]} lacks what is not held here: "
                f"{', '.join(lacking[:5])}"
            )
        current = _current(payload.record)
        manifest = package.manifest
        if manifest.sha256 not in self._tunables:
            self._tunables[manifest.sha256] = self._build(package, payload.record)
        current.update(short(sha256) for sha256 in (manifest.sha256, *manifest.hashes))
        self._memory = {s: tensors for s, tensors in self._memory.items() if short(s) in current}
        self._tunables = {s: t for s, t in self._tunables.items() if short(s) in current}
        return manifest, current

    def _build(self, package: EmulatorPackage, record: Mapping[str, Any]) -> Tunable:
        try:
            settings, tuned = dict(record["adapter"]), list(record["tuned_blocks"])
            if not all(type(index) is int for index in tuned):
                raise TypeError("tuned_blocks must be whole numbers")
            settings["target_modules"] = tuple(settings["target_modules"])
            config = AdapterConfig(**settings)
        except (KeyError, TypeError, ValueError) as error:
            raise EmulatorError(
                f"hold message has no usable adapter settings: {error!r}"
            ) from error
        model = package.build(self._device, self._dtype, self._memory)
        manifest = package.manifest
        try:
            tunable = attach(model, manifest.blocks, tuned, config, kept=manifest.source_blocks)
        except FedPEATError:
            raise
        except Exception as error:  # settings from elsewhere can fail in any way PEFT knows
            raise EmulatorError(
                f"emulator {manifest.sha256[:12]} takes no such adapter: {error!r:.200}"
            ) from error
        self._unshare(tunable)
        return tunable

    def _unshare(self, tunable: Tunable) -> None:
        """Give tuned weights of the network itself, if there are any, memory of their own."""
        shared = {
            tensor.untyped_storage().data_ptr()
            for tensors in self._memory.values()
            for tensor in tensors.values()
        }
        for parameter in tunable.parameters.values():
            if parameter.untyped_storage().data_ptr() in shared:
                parameter.data = parameter.data.clone()

    @property
    def held(self) -> list[str]:
        """Hashes of the emulators that are here."""
        return sorted(self._tunables)

    def get(self, sha256: str) -> Tunable:
        """Return an emulator with its adapter.

        Raises:
            EmulatorError: If it is not here.
        """
        if sha256 not in self._tunables:
            raise EmulatorError(f"no emulator {sha256[:12]} here; ask for it with a hold message")
        return self._tunables[sha256]


def _current(record: Mapping[str, Any]) -> set[str]:
    current = record.get("current")
    if not isinstance(current, list) or not all(isinstance(item, str) for item in current):
        raise EmulatorError(f"current must be a list of beginnings of hashes, got {current!r:.60}")
    return set(current)
