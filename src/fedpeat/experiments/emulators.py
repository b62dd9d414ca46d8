"""Make the emulator of a run: choose blocks, take the recipe's other steps, measure, and pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import transformers

from fedpeat.config.recipe import Recipe, Step, parse_recipe
from fedpeat.config.schema import EmulatorConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.core.seeds import derive_seed, generator
from fedpeat.data.federation import FederatedText
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.few_bits import store_in_few_bits
from fedpeat.emulator.low_rank import factorise
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.selection import choose_blocks
from fedpeat.emulator.width import leave_out_neurons
from fedpeat.experiments.fidelity import Probe, agreement_line, measure_agreement
from fedpeat.experiments.observer import Observer
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.layers import LayerSpec
from fedpeat.model.loading import DTYPES, LoadedModel
from fedpeat.tuning.distillation import DistillSettings, Pair, Terms, distill, measure_fidelity
from fedpeat.tuning.loss import batch_of

__all__ = ["make_emulator"]


@dataclass(frozen=True)
class _Workpiece:
    """An emulator in the making.

    Attributes:
        teacher: The full model.
        student: The emulator, changed by one step after the other.
        blocks: The full model's blocks.
        kept: Those of them that the emulator has.
        tuned: Those that stay as they are.
        batches: Text to look at.
        config: How to distil.
        text: Who owns which text.
        seed: Seed of distillation.
        observer: Is told the progress.
    """

    teacher: transformers.PreTrainedModel
    student: transformers.PreTrainedModel
    blocks: Blocks
    kept: Sequence[int]
    tuned: frozenset[int]
    batches: Sequence[Batch]
    config: EmulatorConfig
    text: FederatedText
    seed: int
    observer: Observer

    @property
    def middle(self) -> list[int]:
        """Places in the emulator of the blocks that are not tuned."""
        return [place for place, index in enumerate(self.kept) if index not in self.tuned]


def make_emulator(
    loaded: LoadedModel,
    blocks: Blocks,
    tuned: Sequence[int],
    config: EmulatorConfig,
    text: FederatedText,
    *,
    seed: int,
    observer: Observer,
    probe: Probe | None = None,
) -> EmulatorPackage:
    """Return the emulator of a model.

    Args:
        loaded: The full model, without an adapter.
        blocks: Its block list.
        tuned: Blocks that are kept as they are, since the adapter sits on them; empty if it sits on
            every kept block.
        config: What to keep and how to distil.
        text: The server's text is used to distil, the validation split to measure.
        seed: Seed of distillation.
        observer: Is told the progress, and what fidelity the budget bought.
        probe: The adapter that the emulator is for, to measure its gradients; None leaves that out.

    Raises:
        EmulatorError: If there is nothing to compress, or no text to distil on.
    """
    recipe = parse_recipe(config.recipe)
    batches = _calibration(loaded, text, config)
    kept = choose_blocks(recipe.selection, loaded.model, blocks, tuned, batches)
    student = build_from_blocks(loaded.model, blocks, kept)
    piece = _Workpiece(
        loaded.model,
        student,
        blocks,
        kept,
        frozenset(tuned),
        batches,
        config,
        text,
        seed,
        observer,
    )
    dtype = loaded.storage_dtype if config.dtype == "auto" else DTYPES[config.dtype]
    layers: list[LayerSpec] = []
    fidelity: dict[str, float] = {}
    if not recipe.is_full:
        before = measure_fidelity(_pair(piece), text.validation, 16)
        for step in recipe.steps[1:]:
            if step.name in _AFTER_ROUNDING:
                _round(student, dtype)
            layers += STEPS[step.name](piece, step)
        _round(student, dtype)  # measure what will be sent
        fidelity = measure_fidelity(_pair(piece), text.validation, 16)
        fidelity |= {f"{name}_before": value for name, value in before.items()}
        observer.message(_fidelity_line(recipe, kept, fidelity))
    package = pack_emulator(
        student,
        loaded.model,
        blocks,
        kept,
        layers=layers,
        recipe=str(recipe),
        dtype=dtype,
        parent_sha256=loaded.sha256,
    )
    if not recipe.is_full and probe is not None:
        del student  # what devices build from the bytes takes its place
        computed = next(loaded.model.parameters())
        piece = replace(piece, student=package.build(computed.device, computed.dtype))
        fidelity |= measure_agreement(
            loaded.model,
            piece.student,
            _pair(piece).meetings,
            blocks,
            kept,
            tuned or kept,
            text,
            probe,
            seed=seed,
        )
        observer.message(agreement_line(fidelity))
    return package.with_fidelity(fidelity)


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round weights to the type that they are sent in; they stay in the one computed in."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize:
                tensor.copy_(tensor.to(dtype))


def _pair(piece: _Workpiece) -> Pair:
    """Pair each kept block of the middle with the last of the blocks that it stands in for."""
    blocks, kept = piece.blocks, piece.kept
    own = blocks.select(kept)
    ends = {start + item.num_blocks for item, start in blocks.starts}
    meetings = []
    for place in piece.middle or [len(kept) - 1]:
        end = next(end for end in sorted(ends) if end > kept[place])
        following = kept[place + 1] if place + 1 < len(kept) else end
        last = min(following, end) - 1
        meetings.append((blocks.output(piece.teacher, last), own.output(piece.student, place)))
    return Pair(piece.teacher, piece.student, meetings)


def _calibration(loaded: LoadedModel, text: FederatedText, config: EmulatorConfig) -> list[Batch]:
    """Return some of the server's text as inputs of the model."""
    if text.server is None:
        return []
    number = max(1, config.calibration_tokens // int(text.server.input_ids.shape[1]))
    data = text.server
    order = generator(0, "calibration").permutation(data.num_examples)[:number]
    device = next(loaded.model.parameters()).device
    batches: list[Batch] = []
    for start in range(0, len(order), config.distill_batch_size):
        ids, mask = batch_of(data, order[start : start + config.distill_batch_size], device)
        batches.append({"input_ids": ids, "labels": ids.masked_fill(~mask, -100)})
    return batches


def _distill(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    if piece.text.server is None:
        raise EmulatorError(
            "emulator.recipe distills, which needs text of the server; raise data.server_ratio "
            "above 0"
        )
    own = piece.blocks.select(piece.kept)
    trainable = [
        parameter
        for place in piece.middle
        for _, part in own.parts(piece.student, place)
        for parameter in part.parameters()
    ]
    config = piece.config
    settings = DistillSettings(
        num_tokens=int(step.value),
        terms=Terms(
            lm=config.distill_lm_weight,
            hidden=config.distill_hidden_weight,
            logit=config.distill_logit_weight,
            block=config.distill_block_weight,
        ),
        learning_rate=config.distill_learning_rate,
        batch_size=config.distill_batch_size,
    )
    with torch.random.fork_rng(devices=[]):
        distill(
            _pair(piece),
            trainable,
            piece.text.server,
            settings,
            seed=derive_seed(piece.seed, "distill"),
            progress=lambda done, total, loss: piece.observer.progress(
                "distil emulator", done, total, f"loss {loss:.3f}"
            ),
        )
    return []


def _low_rank(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    own = piece.blocks.select(piece.kept)
    return factorise(piece.student, own, piece.middle, step.value, piece.batches)


def _width(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    if not piece.tuned:
        raise EmulatorError(
            f"emulator.recipe {step} would leave out neurons of blocks that the adapter sits on; "
            "adapter.placement must be ends or top, got all; low_rank, int8 and int4 work with all"
        )
    own = piece.blocks.select(piece.kept)
    return leave_out_neurons(piece.student, own, piece.middle, step.value, piece.batches)


def _few_bits(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    return store_in_few_bits(piece.student, "int8" if step.name == "int8" else "int4")


STEPS: Mapping[str, Callable[[_Workpiece, Step], list[LayerSpec]]] = {
    "width": _width,
    "low_rank": _low_rank,
    "distill": _distill,
    "int8": _few_bits,
    "int4": _few_bits,
}
_AFTER_ROUNDING = {"int8", "int4"}


def _fidelity_line(recipe: Recipe, kept: Sequence[int], fidelity: dict[str, float]) -> str:
    return (
        f"emulator {recipe} keeps blocks {', '.join(map(str, kept))}: validation perplexity "
        f"{fidelity['perplexity_before']:.2f} -> {fidelity['perplexity']:.2f}, hidden-state error "
        f"{fidelity['hidden_error_before']:.3f} -> {fidelity['hidden_error']:.3f}"
    )
