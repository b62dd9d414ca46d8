"""The full model of a run with an adapter plugged in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeat.adapter.placement import tuned_blocks
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import Config
from fedpeat.experiments.methods import METHODS
from fedpeat.model.blocks import find_blocks
from fedpeat.model.loading import LoadedModel, load_model

__all__ = ["load_full_model", "plugged_model"]


def load_full_model(config: Config) -> LoadedModel:
    """Load the full model that the settings name."""
    model = config.model
    return load_model(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )


def plugged_model(config: Config, state: Mapping[str, np.ndarray]) -> tuple[LoadedModel, Tunable]:
    """Load the full model of a run and plug an adapter in.

    With placement "all" the adapter sits on the blocks that the emulator kept, which its tensors'
    names tell.

    Raises:
        FedPEATError: If the adapter does not fit the model.
    """
    config = METHODS[config.method].settings(config)
    loaded = load_full_model(config)
    blocks = find_blocks(loaded.model, cut=config.model.cut)
    adapter = config.adapter
    tuned = tuned_blocks(adapter.placement, blocks.num_blocks, adapter.num_bottom, adapter.num_top)
    if adapter.placement == "all":
        tuned = sorted({i for n in state if (i := blocks.locate(n)) is not None}) or tuned
    tunable = attach(loaded.model, blocks, tuned, adapter)
    tunable.load(state)
    return loaded, tunable
