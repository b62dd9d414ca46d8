"""Kinds of devices and how many of each a world has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int

from fedpeat.core.errors import WorldError

__all__ = ["KINDS", "PRESETS", "DeviceKind", "kinds_of"]

_WH_J = 3600.0
_GB = 1e9


@dataclass(frozen=True)
class DeviceKind:
    """What devices of a kind have in common; pairs are bounds between which each device is drawn.

    Attributes:
        clock_hz: Clock of the processor [Hz].
        flops_per_cycle: Operations in a cycle at best, all cores together.
        utilisation_ratio: Share of them that training reaches, from round to round.
        capacitance: Effective switched capacitance kappa: a cycle at clock f takes kappa f^2
            [J s^2].
        memory_bytes: Memory that is built in [B].
        free_memory_ratio: Share of it that is free, from round to round.
        tx_power_w: Power that it sends with [W].
        rx_power_w: Power that receiving takes [W].
        battery_j: Energy of a full battery [J]; infinite on the mains.
        charging_w: Power that comes back into the battery all the time, on average [W].
        speed_m_s: Speed of the device, or of what moves about it and makes its channel fade [m/s].
        moves: Whether it is the device itself that moves.
        leaves_ratio: Probability that a device that is there is away in the next round.
        returns_ratio: Probability that one that is away is back in the next round.
        fails_ratio: Probability that one that takes part gives up on the way.
    """

    clock_hz: tuple[float, float]
    flops_per_cycle: float
    utilisation_ratio: tuple[float, float]
    capacitance: float
    memory_bytes: tuple[float, float]
    free_memory_ratio: tuple[float, float]
    tx_power_w: float
    rx_power_w: float
    battery_j: float
    charging_w: float
    speed_m_s: tuple[float, float]
    moves: bool
    leaves_ratio: float
    returns_ratio: float
    fails_ratio: float

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low, high = value if isinstance(value, tuple) else (value, value)
            most = 1.0 if item.name.endswith("_ratio") else math.inf
            finite = math.isfinite(high) or item.name == "battery_j"
            if not (0 <= low <= high <= most and finite):
                raise WorldError(
                    f"{item.name} of a device must be finite, rising and in [0, {most:g}], "
                    f"got {value}"
                )
        positive = ("clock_hz", "flops_per_cycle", "utilisation_ratio", "tx_power_w", "battery_j")
        for name in positive:
            value = getattr(self, name)
            if not (value[0] if isinstance(value, tuple) else value) > 0:
                raise WorldError(f"{name} of a device must be above 0, got {value}")


KINDS: Mapping[str, DeviceKind] = {
    "iot": DeviceKind(
        clock_hz=(1.0e9, 1.8e9),
        flops_per_cycle=32,
        utilisation_ratio=(0.2, 0.4),
        capacitance=1e-28,
        memory_bytes=(1 * _GB, 4 * _GB),
        free_memory_ratio=(0.4, 0.8),
        tx_power_w=0.1,
        rx_power_w=0.3,
        battery_j=20 * _WH_J,
        charging_w=1.0,
        speed_m_s=(0.3, 1.0),
        moves=False,
        leaves_ratio=0.02,
        returns_ratio=0.5,
        fails_ratio=0.02,
    ),
    "phone": DeviceKind(
        clock_hz=(1.8e9, 3.0e9),
        flops_per_cycle=64,
        utilisation_ratio=(0.1, 0.3),
        capacitance=1e-27,
        memory_bytes=(4 * _GB, 12 * _GB),
        free_memory_ratio=(0.2, 0.5),
        tx_power_w=0.2,
        rx_power_w=0.8,
        battery_j=15 * _WH_J,
        charging_w=2.0,
        speed_m_s=(0.5, 2.0),
        moves=True,
        leaves_ratio=0.1,
        returns_ratio=0.4,
        fails_ratio=0.05,
    ),
    "laptop": DeviceKind(
        clock_hz=(2.0e9, 3.5e9),
        flops_per_cycle=128,
        utilisation_ratio=(0.2, 0.5),
        capacitance=1e-26,
        memory_bytes=(8 * _GB, 32 * _GB),
        free_memory_ratio=(0.3, 0.7),
        tx_power_w=0.2,
        rx_power_w=1.0,
        battery_j=math.inf,
        charging_w=0.0,
        speed_m_s=(0.3, 1.0),
        moves=False,
        leaves_ratio=0.05,
        returns_ratio=0.3,
        fails_ratio=0.02,
    ),
    "vehicular": DeviceKind(
        clock_hz=(1.5e9, 2.5e9),
        flops_per_cycle=128,
        utilisation_ratio=(0.2, 0.5),
        capacitance=1e-27,
        memory_bytes=(8 * _GB, 16 * _GB),
        free_memory_ratio=(0.3, 0.7),
        tx_power_w=0.5,
        rx_power_w=1.0,
        battery_j=math.inf,
        charging_w=0.0,
        speed_m_s=(8.0, 30.0),
        moves=True,
        leaves_ratio=0.15,
        returns_ratio=0.3,
        fails_ratio=0.08,
    ),
}
"""Sources: tx_power_w of a phone is 3GPP power class 3 (TS 36.101, 23 dBm), those of a thing and a
vehicle are 20 and 27 dBm, inside the 10 to 27 dBm of the simulations that follow Yang et al.
(2019), arXiv:1911.02417, as is capacitance, 1e-28, with 1e-27 for phones and 1e-26 for laptops.
Everything else is an assumption of ours: round numbers for devices of today, to be replaced by what
is known of a fleet."""

PRESETS: Mapping[str, Mapping[str, float]] = {
    "iot": {"iot": 1.0},
    "phone": {"phone": 1.0},
    "laptop": {"laptop": 1.0},
    "vehicular": {"vehicular": 1.0},
    "mixed": {"iot": 0.3, "phone": 0.4, "laptop": 0.2, "vehicular": 0.1},
}
"""Share of each kind in a world, by the world's name."""


def kinds_of(mix: Mapping[str, float], num_devices: int) -> Int[np.ndarray, " devices"]:
    """Return the kind of each device, as its place in ``mix``, by the largest remainders.

    Args:
        mix: Share of each kind; only ratios matter.
        num_devices: Number of devices.

    Raises:
        WorldError: If a kind is not known, or the shares are none.
    """
    unknown = [name for name in mix if name not in KINDS]
    shares = np.array([float(share) for share in mix.values()])
    total = shares.sum() if len(shares) else 0.0
    if unknown or not (0 < total < math.inf) or shares.min() < 0:
        raise WorldError(
            f"a mix must give shares of {', '.join(KINDS)} that are finite, 0 or more and not all "
            f"0, got {dict(mix)}"
        )
    exact = shares / total * num_devices
    counts = np.floor(exact).astype(int)
    rest = num_devices - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return np.repeat(np.arange(len(counts)), counts)
