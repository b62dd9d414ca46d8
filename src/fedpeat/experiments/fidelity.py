"""Measure how faithful an emulator is, on the bytes that devices build it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from fedpeat.adapter.slices import Slices, filled_in, sliced, slices_of
from fedpeat.adapter.tunable import Tunable, attached
from fedpeat.config.schema import AdapterConfig, Config
from fedpeat.core.seeds import derive_seed
from fedpeat.data.examples import Examples, FederatedData
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import Kept
from fedpeat.tuning.distillation import Pair
from fedpeat.tuning.fidelity import adapter_gradient, agreement, gradient_cosines
from fedpeat.tuning.local import LocalSettings, train

__all__ = ["Probe", "agreement_line", "measure_agreement"]

NUM_EXAMPLES = 32
"""Examples of the validation split that the two are compared on: blocks of text, or images."""
BATCH_SIZE = 8


@dataclass(frozen=True)
class Probe:
    """How an adapter is tried on an emulator: as the devices of the run will tune it.

    Attributes:
        adapter: The adapter.
        settings: How a device trains.
        num_steps: Steps after which gradients are compared once more.
    """

    adapter: AdapterConfig
    settings: LocalSettings
    num_steps: int

    @classmethod
    def of(cls, config: Config) -> Probe:
        """Return the probe of a run."""
        local = config.local
        settings = LocalSettings(
            batch_size=local.local_batch_size,
            learning_rate=local.local_learning_rate,
            weight_decay=local.weight_decay,
            max_grad_norm=local.max_grad_norm,
        )
        return cls(config.adapter, settings, local.local_steps)


def measure_agreement(
    model: transformers.PreTrainedModel,
    emulator: transformers.PreTrainedModel,
    meetings: Sequence[tuple[nn.Module, nn.Module]],
    blocks: Blocks,
    kept: Sequence[int],
    tuned: Sequence[int],
    data: FederatedData[Examples],
    probe: Probe,
    *,
    narrow: Kept,
    seed: int,
) -> dict[str, float]:
    """Return agreement of states, predictions and the adapter's gradients, on held-out data.

    Gradients are compared at the fresh adapter, and again (``..._tuned``) where one round of a
    device's steps on the emulator takes it; these are made on the server's data, or on the
    validation split where the server has none. Both networks are left as they were.

    Args:
        model: The full model.
        emulator: Its emulator, as devices build it.
        meetings: Blocks of both after which hidden states should agree; the last pair counts.
        blocks: The full model's blocks.
        kept: Index in the full model of each block of the emulator.
        tuned: Blocks that the adapter sits on.
        data: Text or images, held out and the server's.
        probe: The adapter, and how it is tuned.
        narrow: Rows and columns that the emulator's narrower layers have.
        seed: Seed of the run.
    """
    pair = Pair(model, emulator, meetings)
    shown = data.validation.spread(NUM_EXAMPLES)
    measured = agreement(pair, shown, BATCH_SIZE)
    init = derive_seed(seed, "adapter")
    with (
        attached(model, blocks, tuned, probe.adapter, seed=init) as full,
        attached(emulator, blocks, tuned, probe.adapter, kept=kept, seed=init) as small,
    ):
        slices = slices_of(full.shapes, narrow)
        start = full.state()
        own = sliced(start, slices)
        if {name: array.shape for name, array in own.items()} != small.shapes:
            return measured  # they cannot hold equal values
        small.load(own)
        measured |= _compared(full, small, slices, shown, blocks)
        train(
            small,
            data.server or data.validation,
            probe.settings,
            num_steps=probe.num_steps,
            first_step=0,
            seed=derive_seed(seed, "probe"),
        )
        full.load(filled_in(start, slices, small.state()))
        tuned_too = _compared(full, small, slices, shown, blocks)
    return measured | {
        name.replace("gradient_cosine", "gradient_cosine_tuned"): value
        for name, value in tuned_too.items()
    }


def agreement_line(fidelity: Mapping[str, float]) -> str:
    """Return what was measured in one line for people to read."""
    texts = [
        f"{label} {fidelity[name]:{form}}"
        for name, label, form in (
            ("hidden_cosine", "hidden-state cosine", ".3f"),
            ("logit_kl", "KL", ".3f"),
            ("top1_agreement", "same first guess", ".0%"),
            ("gradient_cosine", "adapter-gradient cosine", ".3f"),
            ("gradient_cosine_tuned", "after some steps", ".3f"),
        )
        if name in fidelity
    ]
    return f"emulator against full model: {', '.join(texts)}"


def _compared(
    full: Tunable, emulator: Tunable, slices: Slices, data: Examples, blocks: Blocks
) -> dict[str, float]:
    one, other = (adapter_gradient(part, data, BATCH_SIZE) for part in (full, emulator))
    own = {
        name: g.index_select(slices[name].axis, torch.from_numpy(slices[name].indices).to(g.device))
        if name in slices
        else g
        for name, g in one.items()
    }
    return gradient_cosines(own, other, blocks)
