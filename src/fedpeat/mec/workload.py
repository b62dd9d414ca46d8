"""What a federation asks of devices: bytes to move, work to do, memory to have, rung by rung."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from fedpeat.core.errors import WorldError

__all__ = ["RungLoad", "WorkloadProfile"]


@dataclass(frozen=True)
class RungLoad:
    """What one rung of a ladder costs a device.

    Attributes:
        name: Its name.
        parts: Bytes of the emulator's parts by their hashes; rungs share parts.
        adapter_down_bytes: Message with the adapter, to the device.
        adapter_up_bytes: Message with its update.
        step_flops: Operations of one local step.
        memory_bytes: Memory that tuning on it takes: weights, adapter, optimiser, activations.
    """

    name: str
    parts: Mapping[str, int]
    adapter_down_bytes: int
    adapter_up_bytes: int
    step_flops: float
    memory_bytes: float

    def __post_init__(self) -> None:
        numbers = {
            "adapter_down_bytes": self.adapter_down_bytes,
            "adapter_up_bytes": self.adapter_up_bytes,
            "step_flops": self.step_flops,
            "memory_bytes": self.memory_bytes,
            **{f"parts[{name}]": size for name, size in self.parts.items()},
        }
        for name, value in numbers.items():
            if not (math.isfinite(value) and value >= 0):
                raise WorldError(f"rung {self.name}: {name} must be finite, 0 or more, got {value}")


@dataclass(frozen=True)
class WorkloadProfile:
    """What a federation costs, whatever the network behind it.

    Attributes:
        rungs: The ladder, the largest emulator first.
        server_step_flops: Operations of one step of the server on the full model.
        realign_flops: Operations of one alignment of all rungs.
        refresh_bytes: Bytes that such an alignment then sends to a device, by rung.
    """

    rungs: Sequence[RungLoad]
    server_step_flops: float = 0.0
    realign_flops: float = 0.0
    refresh_bytes: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        names = [rung.name for rung in self.rungs]
        if not names or len(set(names)) < len(names):
            raise WorldError(f"a workload must have rungs with names of their own, got {names}")
        for name in ("server_step_flops", "realign_flops"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise WorldError(f"workload: {name} must be finite, 0 or more, got {value}")

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        return asdict(replace(self, rungs=tuple(self.rungs)))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> WorkloadProfile:
        """Return what ``record`` was made of.

        Raises:
            WorldError: If it is damaged.
        """
        try:
            return cls(**{**record, "rungs": [RungLoad(**rung) for rung in record["rungs"]]})
        except (KeyError, TypeError) as error:
            raise WorldError(f"the record of a workload is damaged: {error}") from error

    @property
    def num_rungs(self) -> int:
        """Number of rungs."""
        return len(self.rungs)

    @cached_property
    def exchange_bytes(self) -> Float[np.ndarray, "held wanted"]:
        """Bytes of the parts that a device lacks, by the rung held (the last row: none) and wanted.

        A device that moves down a rung has all that it needs.
        """
        held: list[Mapping[str, int]] = [*(rung.parts for rung in self.rungs), {}]
        return np.array(
            [
                [sum(size for h, size in rung.parts.items() if h not in own) for rung in self.rungs]
                for own in held
            ],
            dtype=np.float64,
        )

    @cached_property
    def fresh_bytes(self) -> Float[np.ndarray, " rungs"]:
        """Bytes that an alignment sends to a device that holds an emulator, by rung."""
        refresh = self.refresh_bytes or {}
        return np.array([refresh.get(rung.name, 0) for rung in self.rungs], dtype=np.float64)

    def of(self, attribute: str) -> Float[np.ndarray, " rungs"]:
        """Return an attribute of all rungs."""
        return np.array([getattr(rung, attribute) for rung in self.rungs], dtype=np.float64)
