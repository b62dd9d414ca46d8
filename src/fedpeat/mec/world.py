"""A cell with devices: who is there, how well they are reached, and what a round costs them.

Many worlds go side by side: arrays are (worlds, devices). Quantities are in SI units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Complex, Float, Int

from fedpeat.core.errors import WorldError
from fedpeat.mec import channel
from fedpeat.mec.allocation import equal_finish_shares, uplink_s
from fedpeat.mec.constants import (
    BASE_STATION_POWER_W,
    CARRIER_HZ,
    MIN_DISTANCE_M,
    NOISE_DENSITY_W_HZ,
    SHADOWING_DB,
)
from fedpeat.mec.devices import KINDS, PRESETS, kinds_of
from fedpeat.mec.workload import WorkloadProfile

__all__ = [
    "NONE_HELD",
    "Demand",
    "EdgeWorld",
    "RoundCost",
    "WorldSettings",
    "begun_anew",
    "picked_rows",
]

Record = TypeVar("Record")
Reals = Float[np.ndarray, "worlds devices"]
Flags = Bool[np.ndarray, "worlds devices"]
NONE_HELD = -1
"""Rung of a device that holds no emulator."""


@dataclass(frozen=True)
class WorldSettings:
    """What a world is like.

    Attributes:
        preset: Which devices there are, a name in ``devices.PRESETS``.
        num_devices: How many.
        radius_m: Radius of the cell [m].
        down_bandwidth_hz: Band from the base station to the devices [Hz].
        up_bandwidth_hz: Band from the devices to the base station [Hz].
        deadline_s: Replies later than this are lost [s]; None waits for everyone.
        server_flops_per_s: What the server reaches [1/s].
        server_power_w: Power that the server takes while it computes [W].
        still: Whether all stays as it is drawn when a world begins, but for batteries and what the
            devices hold, and nobody fails: for worlds small enough to be solved.
    """

    preset: str = "mixed"
    num_devices: int = 10
    radius_m: float = 500.0
    down_bandwidth_hz: float = 20e6
    up_bandwidth_hz: float = 20e6
    deadline_s: float | None = None
    server_flops_per_s: float = 50e12
    server_power_w: float = 400.0
    still: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise WorldError(
                f"preset of a world must be one of {', '.join(PRESETS)}, got {self.preset!r}"
            )
        if self.num_devices < 1:
            raise WorldError(f"num_devices of a world must be at least 1, got {self.num_devices}")
        for name in (
            "down_bandwidth_hz",
            "up_bandwidth_hz",
            "server_flops_per_s",
            "server_power_w",
            "deadline_s",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise WorldError(f"{name} of a world must be finite and above 0, got {value}")
        if not (math.isfinite(self.radius_m) and self.radius_m > MIN_DISTANCE_M):
            raise WorldError(
                f"radius_m of a world must be finite and above {MIN_DISTANCE_M:g}, "
                f"got {self.radius_m}"
            )


@dataclass(frozen=True)
class Demand:
    """What is asked of everyone in one round.

    Attributes:
        takes_part: Who is asked at all.
        rung: Place in the ladder of the emulator that each is to tune on.
        local_steps: Local steps of each.
        share: Share of both bands for each; None for shares with which all finish together.
        server_steps: Steps of the server, which go on beside the devices'.
        realigns: Whether emulators are aligned anew first.
    """

    takes_part: Flags
    rung: Int[np.ndarray, "worlds devices"]
    local_steps: Int[np.ndarray, "worlds devices"]
    share: Reals | None
    server_steps: Int[np.ndarray, " worlds"]
    realigns: Bool[np.ndarray, " worlds"]


@dataclass(frozen=True)
class RoundCost:
    """What a round cost.

    Attributes:
        seconds: How long it took [s].
        finished: Whose update came back in time.
        device_s: When each was done [s]; 0 for those who took no part.
        device_j: Energy of each [J].
        server_j: Energy of the server [J].
        bytes_down: Bytes to each.
        bytes_up: Bytes from each.
    """

    seconds: Float[np.ndarray, " worlds"]
    finished: Flags
    device_s: Reals
    device_j: Reals
    server_j: Float[np.ndarray, " worlds"]
    bytes_down: Reals
    bytes_up: Reals

    @property
    def totals(self) -> Float[np.ndarray, "worlds costs"]:
        """Time [s], energy of devices and server [J], and bytes both ways, of each world."""
        joules = self.device_j.sum(-1) + self.server_j
        return np.stack([self.seconds, joules, (self.bytes_down + self.bytes_up).sum(-1)], -1)


@dataclass(frozen=True)
class _State:
    """What changes from round to round."""

    distance_m: Reals
    shadowing_db: Reals
    fading_down: Complex[np.ndarray, "worlds devices"]
    fading_up: Complex[np.ndarray, "worlds devices"]
    utilisation: Reals
    free_memory_bytes: Reals
    battery_j: Reals
    present: Flags
    held: Int[np.ndarray, "worlds devices"]


@dataclass(frozen=True)
class _Traits:
    """What each device is for good, drawn when a world begins."""

    clock_hz: Reals
    memory_bytes: Reals
    speed_m_s: Reals


class EdgeWorld:
    """Worlds side by side, each with the same kinds of devices.

    Args:
        settings: What they are like.
        workload: What the federation asks of devices.
        num_worlds: How many.
        rng: Every draw comes from it.

    Raises:
        WorldError: If no device could ever hold any rung.
    """

    def __init__(
        self,
        settings: WorldSettings,
        workload: WorkloadProfile,
        num_worlds: int,
        rng: np.random.Generator,
    ) -> None:
        self.settings = settings
        self.workload = workload
        self.num_worlds = num_worlds
        self._rng = rng
        mix = PRESETS[settings.preset]
        kinds = [KINDS[name] for name in mix]
        kind_of = kinds_of(mix, settings.num_devices)
        self._common = {  # what a device has from its kind, (devices)
            f"{name}{suffix}": np.array([pick(getattr(kind, name)) for kind in kinds])[kind_of]
            for name in kinds[0].__dataclass_fields__
            for suffix, pick in (("", _low), ("_high", _high))
        }
        self._rungs = {
            name: workload.of(name)
            for name in ("adapter_down_bytes", "adapter_up_bytes", "step_flops", "memory_bytes")
        }
        least = self._rungs["memory_bytes"].min()
        most = (self._common["memory_bytes_high"] * self._common["free_memory_ratio_high"]).max()
        if least > most:
            raise WorldError(
                f"no device of a {settings.preset} world can hold any rung: the smallest takes "
                f"{least:.3g} bytes and none ever has more than {most:.3g} free"
            )
        self._traits, self._state = self._drawn()
        self._snr = self._received()
        self._feasible: tuple[_State, Bool[np.ndarray, "worlds devices rungs"]] | None = None

    # --- what can be seen of it --------------------------------------------------------------

    @property
    def snr_down(self) -> Reals:
        """Signal-to-noise ratio of each device on the whole band down, linear."""
        return self._snr[0]

    @property
    def snr_up(self) -> Reals:
        """The same on the whole band up, all power of the device spread over it."""
        return self._snr[1]

    @property
    def clock_hz(self) -> Reals:
        """Clock of each device's processor [Hz]."""
        return self._traits.clock_hz

    @property
    def flops_per_s(self) -> Reals:
        """Operations that each device reaches in this round [1/s]."""
        cycles = self._traits.clock_hz * self._common["flops_per_cycle"]
        return np.asarray(cycles * self._state.utilisation)

    @property
    def distance_m(self) -> Reals:
        """Distance of each device from the base station [m]."""
        return self._state.distance_m

    @property
    def free_memory_bytes(self) -> Reals:
        """Memory that each device has free in this round [B]."""
        return self._state.free_memory_bytes

    @property
    def battery_ratio(self) -> Reals:
        """Charge of each device's battery, in [0, 1]; 1 on the mains."""
        full = self._common["battery_j"]
        finite = np.where(np.isfinite(full), full, 1.0)
        return np.where(np.isfinite(full), self._state.battery_j / finite, 1.0)

    @property
    def present(self) -> Flags:
        """Who is there."""
        return self._state.present

    @property
    def held(self) -> Int[np.ndarray, "worlds devices"]:
        """Rung that each device holds, or ``NONE_HELD``."""
        return self._state.held

    @property
    def feasible(self) -> Bool[np.ndarray, "worlds devices rungs"]:
        """Which rungs each device could tune on now: it is there, and has the memory."""
        if self._feasible is None or self._feasible[0] is not self._state:
            fits = self._state.free_memory_bytes >= self._rungs["memory_bytes"][:, None, None]
            self._feasible = self._state, np.moveaxis(fits & self._alive, 0, -1)
        return self._feasible[1]

    @property
    def _alive(self) -> Flags:
        return np.asarray(self._state.present & (self._state.battery_j > 0))

    # --- what happens to it ------------------------------------------------------------------

    def run_round(self, demand: Demand) -> RoundCost:
        """Let a round pass and return what it cost; the world goes on meanwhile.

        Raises:
            WorldError: If a device is asked for what is not feasible.
        """
        cost = self.price(demand)
        if not self.settings.still:
            fails = self._rng.random(cost.finished.shape) < self._common["fails_ratio"]
            cost = replace(cost, finished=cost.finished & ~fails)
        self._go_on(demand, cost)
        return cost

    def state(self) -> dict[str, np.ndarray]:
        """Return all that changes or was drawn, by name; the stream of draws is not in it."""
        return {**vars(self._traits), **vars(self._state)}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from what ``state`` returned."""
        self._traits = _Traits(**{n: arrays[n] for n in vars(self._traits)})
        self._state = _State(**{n: arrays[n] for n in vars(self._state)})
        self._snr = self._received()

    def picked(self, rows: Int[np.ndarray, " picked"]) -> EdgeWorld:
        """Return worlds of their own that go on from some of these, perhaps repeated."""
        other = copy.copy(self)
        other.num_worlds = len(rows)
        other._traits = picked_rows(rows, self._traits)  # noqa: SLF001 - of this very class
        other._state = picked_rows(rows, self._state)  # noqa: SLF001
        other._snr = other._received()  # noqa: SLF001
        return other

    def reset(self, which: Bool[np.ndarray, " worlds"]) -> None:
        """Begin some of the worlds anew, with other devices of the same kinds."""
        traits, state = self._drawn()
        self._traits = begun_anew(which, self._traits, traits)
        self._state = begun_anew(which, self._state, state)
        self._snr = self._received()

    def _drawn(self) -> tuple[_Traits, _State]:
        shape = (self.num_worlds, self.settings.num_devices)
        traits = _Traits(*(self._between(n) for n in ("clock_hz", "memory_bytes", "speed_m_s")))
        return traits, _State(
            distance_m=self._distances(shape),
            shadowing_db=self._rng.standard_normal(shape) * SHADOWING_DB,
            fading_down=channel.fresh_fading(shape, self._rng),
            fading_up=channel.fresh_fading(shape, self._rng),
            utilisation=self._between("utilisation_ratio"),
            free_memory_bytes=traits.memory_bytes * self._between("free_memory_ratio"),
            battery_j=np.broadcast_to(self._common["battery_j"], shape).copy(),
            present=np.ones(shape, dtype=bool),
            held=np.full(shape, NONE_HELD),
        )

    def _between(self, name: str) -> Reals:
        shape = (self.num_worlds, self.settings.num_devices)
        low, high = self._common[name], self._common[f"{name}_high"]
        return np.asarray(low + (high - low) * self._rng.random(shape))

    def _distances(self, shape: tuple[int, ...] | int) -> Float[np.ndarray, ...]:
        """Return distances of places that are uniform over the cell."""
        return np.asarray(self.settings.radius_m * np.sqrt(self._rng.random(shape)))

    def _received(self) -> tuple[Reals, Reals]:
        """Return the signal-to-noise ratios on the whole bands, down and up."""
        loss_db = channel.path_loss_db(self.distance_m) + self._state.shadowing_db
        gain = channel.linear(-loss_db)
        down, up = (
            gain * (fading.real**2 + fading.imag**2)
            for fading in (self._state.fading_down, self._state.fading_up)
        )
        settings = self.settings
        power_down = BASE_STATION_POWER_W / (NOISE_DENSITY_W_HZ * settings.down_bandwidth_hz)
        power_up = self._common["tx_power_w"] / (NOISE_DENSITY_W_HZ * settings.up_bandwidth_hz)
        return np.asarray(power_down * down), np.asarray(power_up * up)

    def price(self, demand: Demand) -> RoundCost:
        """Return what a round would cost if nobody failed; nothing changes.

        Raises:
            WorldError: If a device is asked for what is not feasible.
        """
        settings, active = self.settings, demand.takes_part
        of_rung = {name: values[demand.rung] for name, values in self._rungs.items()}
        possible = self._alive & (self._state.free_memory_bytes >= of_rung.pop("memory_bytes"))
        if bool((active & ~possible).any()):
            raise WorldError("a device is asked to tune on a rung that it cannot hold now")
        asked = {name: np.where(active, values, 0.0) for name, values in of_rung.items()}
        exchanged = np.where(active, self._exchanged(demand), 0.0)
        down_bytes = asked["adapter_down_bytes"] + exchanged
        compute_s = demand.local_steps * asked["step_flops"] / self.flops_per_s
        down_s = (
            8
            * down_bytes
            / channel.achievable_rate_bps(self.snr_down, np.asarray(settings.down_bandwidth_hz))
        )
        up_bits_per_hz = 8 * asked["adapter_up_bytes"] / settings.up_bandwidth_hz
        snr = self.snr_up
        if demand.share is None:
            share = equal_finish_shares(compute_s, down_s, up_bits_per_hz, snr, active)
        else:
            share = np.where(active, demand.share, 0.0)
        safe = np.where(share > 0, share, 1.0)
        up_s = uplink_s(safe, up_bits_per_hz, snr)
        finish = down_s / safe + compute_s + up_s
        realign_s = demand.realigns * self.workload.realign_flops / settings.server_flops_per_s
        server_s = (
            demand.server_steps * self.workload.server_step_flops / settings.server_flops_per_s
        )
        finished = active
        if settings.deadline_s is not None:
            finished = active & (finish <= settings.deadline_s)
        awaited = np.where(active, finish, 0.0).max(-1)
        if settings.deadline_s is not None:
            awaited = np.minimum(awaited, settings.deadline_s)
        cycles = compute_s * self._traits.clock_hz
        energy = (
            self._common["capacitance"] * self._traits.clock_hz**2 * cycles
            + self._common["tx_power_w"] * up_s
            + self._common["rx_power_w"] * down_s / safe
        )
        return RoundCost(
            seconds=realign_s + np.maximum(awaited, server_s),
            finished=finished,
            device_s=np.where(active, finish, 0.0),
            device_j=np.where(active, energy, 0.0),
            server_j=(realign_s + server_s) * settings.server_power_w,
            bytes_down=down_bytes,
            bytes_up=asked["adapter_up_bytes"],
        )

    def _exchanged(self, demand: Demand) -> Reals:
        """Return the bytes of emulator that each device lacks."""
        lacking = self.workload.exchange_bytes[self._state.held, demand.rung]
        if not demand.realigns.any():
            return np.asarray(lacking)
        aligned = demand.realigns[:, None] & (self._state.held != NONE_HELD)
        return np.asarray(lacking + np.where(aligned, self.workload.fresh_bytes[demand.rung], 0.0))

    def _go_on(self, demand: Demand, cost: RoundCost) -> None:
        """Move devices and what is about them through the time that a round took."""
        state, common, rng = self._state, self._common, self._rng
        elapsed = cost.seconds[:, None]
        battery = state.battery_j - cost.device_j + common["charging_w"] * elapsed
        state = replace(
            state,
            battery_j=np.clip(battery, 0, common["battery_j"]),
            held=np.where(demand.takes_part, demand.rung, state.held),
        )
        if self.settings.still:
            self._state = state
            return
        moved_m = np.where(common["moves"] > 0, self._traits.speed_m_s * elapsed, 0.0)
        # the distance after a step at an angle to the way from the base station, any as likely
        radial_m = moved_m * channel.cosine(2 * np.pi * rng.random(moved_m.shape))
        squared_m2 = state.distance_m**2 + moved_m**2 + 2 * state.distance_m * radial_m
        distance_m = np.sqrt(np.maximum(squared_m2, 0))
        outside = distance_m > self.settings.radius_m
        distance_m[outside] = self._distances(int(outside.sum()))
        faded = channel.fading_correlation(self._traits.speed_m_s, CARRIER_HZ, elapsed)
        stays = rng.random(moved_m.shape) >= np.where(
            state.present, common["leaves_ratio"], 1 - common["returns_ratio"]
        )
        self._state = replace(
            state,
            distance_m=distance_m,
            shadowing_db=channel.next_shadowing(
                state.shadowing_db, channel.shadowing_correlation(moved_m), SHADOWING_DB, rng
            ),
            fading_down=channel.next_fading(state.fading_down, faded, rng),
            fading_up=channel.next_fading(state.fading_up, faded, rng),
            utilisation=self._between("utilisation_ratio"),
            free_memory_bytes=self._traits.memory_bytes * self._between("free_memory_ratio"),
            present=stays,
        )
        self._snr = self._received()


def picked_rows(rows: Int[np.ndarray, " picked"], old: Record) -> Record:
    """Return a dataclass of arrays (worlds, ...) with some of the worlds, perhaps repeated."""
    return type(old)(**{name: array[rows] for name, array in vars(old).items()})


def begun_anew(which: Bool[np.ndarray, " worlds"], old: Record, new: Record) -> Record:
    """Return a dataclass of arrays (worlds, ...) that is the new one in some of the worlds."""
    picked = {
        name: np.where(which.reshape((-1,) + (1,) * (array.ndim - 1)), vars(new)[name], array)
        for name, array in vars(old).items()
    }
    return type(old)(**picked)


def _low(value: float | tuple[float, float]) -> float:
    return float(value[0] if isinstance(value, tuple) else value)


def _high(value: float | tuple[float, float]) -> float:
    return float(value[1] if isinstance(value, tuple) else value)
