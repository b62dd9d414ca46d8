"""What goes from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpeat.federated.privacy import Steps

__all__ = ["FederationState"]


@dataclass(frozen=True)
class FederationState:
    """What goes from round to round, and into the checkpoint."""

    server_round: int
    adapter: Mapping[str, np.ndarray]
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)
    last_losses: Mapping[str, float] = field(default_factory=dict)
    num_barren_rounds: int = 0
    num_rejections: Mapping[str, int] = field(default_factory=dict)
    private_steps: Steps = field(default_factory=dict)
