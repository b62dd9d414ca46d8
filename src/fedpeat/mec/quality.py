"""How the work of a round changes the full model's loss: an ensemble of curves, few constants."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int

from fedpeat.core.errors import WorldError

__all__ = ["QualityModel", "RoundWork", "effective_number", "recent_shares"]

_MEMORY = 0.7
"""What a round counts in the next one of those that had a part of late."""


@dataclass(frozen=True)
class RoundWork:
    """What the updates of a round are made of, in each of some worlds.

    Attributes:
        rung_share: Share of the devices' examples on each rung; sums to 1, or to 0 without devices.
        num_effective: Number of devices of equal weight that would average as well,
            (sum n)^2 / sum n^2 over their examples n; 0 without devices.
        local_steps: Mean number of local steps of the devices, weighted by examples.
        server_share: Share of the server in the average, in [0, 1].
        server_steps: Steps of the server.
        staleness: Rounds since the emulators were made or aligned.
        num_recent: As ``num_effective``, of the devices of this round and of those before, which
            count the less the longer ago they were; see ``recent_shares``.
    """

    rung_share: Float[np.ndarray, "worlds rungs"]
    num_effective: Float[np.ndarray, " worlds"]
    local_steps: Float[np.ndarray, " worlds"]
    server_share: Float[np.ndarray, " worlds"]
    server_steps: Float[np.ndarray, " worlds"]
    staleness: Float[np.ndarray, " worlds"]
    num_recent: Float[np.ndarray, " worlds"]


def recent_shares(
    recent: Float[np.ndarray, "*worlds devices"], weights: Float[np.ndarray, "*worlds devices"]
) -> Float[np.ndarray, "*worlds devices"]:
    """Return what each device has had of the latest rounds, another round counted.

    Args:
        recent: The same before the round.
        weights: Weights of the devices' updates in the round; all 0 where nobody's came back,
            which changes nothing.
    """
    total = weights.sum(-1, keepdims=True)
    shares = weights / np.maximum(total, 1e-12)
    return np.where(total > 0, _MEMORY * recent + shares, recent)


def effective_number(weights: Float[np.ndarray, "*worlds devices"]) -> Float[np.ndarray, "*worlds"]:
    """Return how many devices of equal weight would be as diverse; 0 without any.

    Source:
        Kish (1965), Survey sampling, for the effective size of a weighted sample.
    """
    return np.asarray(weights.sum(-1) ** 2 / np.maximum((weights**2).sum(-1), 1e-24))


@dataclass(frozen=True)
class QualityModel:
    """An ensemble that says how the loss of the plugged-in model goes on.

    A round takes the loss towards a floor, L' = L - (1 - exp(-p)) (L - F), with

        p = (1 - s) K^gamma exp(-zeta a) sum_r q_r speed_r m^beta + s speed_server m_server^beta
        F = floor + (1 - s) (sum_r q_r excess_r + skew / max(D, 1))

    where s is the server's share, K the effective number of devices, a the staleness, q_r the share
    of rung r, m the number of local steps, and D the effective number of devices that had a part of
    late. A rung whose gradients are not quite the full model's is slower, and settles higher; so
    does what follows the data of few devices. The form is ours; its constants are fitted to real
    rounds, each member's to another draw of them.

    Attributes:
        speed: Progress of a step on each rung.
        excess: How much higher the loss settles with each rung alone [nat].
        skew: How much higher it settles where all updates are those of one device [nat].
        server_speed: Progress of a step of the server.
        steps_power: beta, the return on more steps.
        devices_power: gamma, the return on more devices.
        staleness_decay: zeta, the loss of speed with each round since alignment.
        floor: Where the loss settles with the full model alone [nat].
    """

    speed: Float[np.ndarray, "members rungs"]
    excess: Float[np.ndarray, "members rungs"]
    skew: Float[np.ndarray, " members"]
    server_speed: Float[np.ndarray, " members"]
    steps_power: Float[np.ndarray, " members"]
    devices_power: Float[np.ndarray, " members"]
    staleness_decay: Float[np.ndarray, " members"]
    floor: Float[np.ndarray, " members"]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = -np.inf if item.name == "floor" else 0.0
            if not (np.isfinite(value).all() and (value >= least).all()):
                raise WorldError(
                    f"{item.name} of a quality model must be finite, {least:g} or more, "
                    f"got {value.tolist()}"
                )

    @property
    def num_members(self) -> int:
        """Size of the ensemble."""
        return len(self.floor)

    def mean(self) -> QualityModel:
        """Return one curve whose constants are the means of the members'."""
        means = {item.name: getattr(self, item.name).mean(0)[None] for item in fields(self)}
        return QualityModel(**means)

    def next_loss(
        self,
        loss: Float[np.ndarray, " worlds"],
        work: RoundWork,
        member: Int[np.ndarray, " worlds"],
    ) -> Float[np.ndarray, " worlds"]:
        """Return the loss after a round.

        Args:
            loss: Loss of the plugged-in model before it [nat per token, or per image].
            work: What the round's updates are made of.
            member: Which curve of the ensemble each world follows.
        """
        devices = 1 - work.server_share
        speed = (work.rung_share * self.speed[member]).sum(-1)
        power = self.steps_power[member]
        faded = np.exp(-self.staleness_decay[member] * work.staleness)
        crowd = np.where(
            work.num_effective > 0, work.num_effective ** self.devices_power[member], 0.0
        )
        progress = devices * crowd * faded * speed * work.local_steps**power
        progress += work.server_share * self.server_speed[member] * work.server_steps**power
        excess = (work.rung_share * self.excess[member]).sum(-1)
        excess += self.skew[member] / np.maximum(work.num_recent, 1.0)
        floor = self.floor[member] + devices * excess
        return np.asarray(loss + np.expm1(-progress) * (loss - floor))
