"""Make the emulators of a run: choose blocks, take the recipe's other steps, measure, and pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import transformers

from fedpeat.config.recipe import Recipe, Step, parse_recipe
from fedpeat.config.schema import EmulatorConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.core.seeds import derive_seed, generator
from fedpeat.data.examples import Examples, FederatedData
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.few_bits import store_in_few_bits
from fedpeat.emulator.heads import leave_out_heads
from fedpeat.emulator.narrowing import Narrowed, through
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.selection import choose_rungs
from fedpeat.emulator.width import leave_out_neurons
from fedpeat.experiments.fidelity import Probe, agreement_line, measure_agreement
from fedpeat.experiments.ladder import Ladder
from fedpeat.experiments.observer import Observer
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import borrow_blocks
from fedpeat.model.layers import LayerSpec
from fedpeat.model.loading import DTYPES, LoadedModel
from fedpeat.tuning.distillation import DistillSettings, Terms, distill, measure_fidelity
from fedpeat.tuning.loss import batch_of

__all__ = ["distill_settings", "make_emulators", "rung_name"]


def rung_name(ratio: float) -> str:
    """Return the name of a rung: the share of the blocks that it keeps."""
    return f"{ratio:g}"


@dataclass(frozen=True)
class _Workpiece:
    """The emulators in the making; what is done to a block is done to it on every rung.

    Attributes:
        ladder: Full model and emulators.
        batches: Examples to look at.
        config: How to distil.
        data: Who owns which text or images.
        seed: Seed of distillation.
        observer: Is told the progress.
        kept: What narrower layers have of the full model's so far; steps add to it.
    """

    ladder: Ladder
    batches: Sequence[Batch]
    config: EmulatorConfig
    data: FederatedData[Examples]
    seed: int
    observer: Observer
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)


def make_emulators(
    loaded: LoadedModel,
    blocks: Blocks,
    tuned: Sequence[int],
    config: EmulatorConfig,
    data: FederatedData[Examples],
    metric: str,
    *,
    seed: int,
    observer: Observer,
    probe: Probe | None = None,
) -> dict[str, EmulatorPackage]:
    """Return the emulators of a model by the names of their rungs, the largest first.

    The blocks of a rung are among those of the rung above it, with the same weights.

    Args:
        loaded: The full model, without an adapter.
        blocks: Its block list.
        tuned: Blocks that are kept as they are, since the adapter sits on them; empty if it sits on
            every kept block.
        config: What to keep and how to distil.
        data: The server's own is used to distil, the validation split to measure.
        metric: What measures the emulators beside the full model.
        seed: Seed of distillation.
        observer: Is told the progress, and what fidelity the budget bought.
        probe: The adapter that the emulator is for, to measure its gradients; None leaves that out.

    Raises:
        EmulatorError: If there is nothing to compress, or no data to distil on.
    """
    top = parse_recipe(config.recipe)
    recipes = {rung_name(top.ratio): top}
    recipes |= {rung_name(ratio): top.at(ratio) for ratio in config.lower_rungs}
    packages = _made(loaded, blocks, tuned, config, recipes, data, metric, seed, observer)
    if top.is_full or probe is None:
        return packages
    for name, package in packages.items():
        agreement = _agreement(loaded.model, tuned, package, data, probe, seed)
        observer.message(agreement_line(agreement))
        packages[name] = package.with_fidelity({**package.manifest.fidelity, **agreement})
    return packages


def _made(
    loaded: LoadedModel,
    blocks: Blocks,
    tuned: Sequence[int],
    config: EmulatorConfig,
    recipes: Mapping[str, Recipe],
    data: FederatedData[Examples],
    metric: str,
    seed: int,
    observer: Observer,
) -> dict[str, EmulatorPackage]:
    """Return the emulators; the network that they were made in is gone afterwards."""
    top = next(iter(recipes.values()))
    batches = _calibration(loaded, data, config)
    steps = [recipe.selection for recipe in recipes.values()]
    kept = choose_rungs(steps, loaded.model, blocks, tuned, batches)
    student = borrow_blocks(loaded.model, blocks, kept[0])
    ladder = Ladder(
        loaded.model, student, blocks, dict(zip(recipes, kept, strict=True)), frozenset(tuned)
    )
    dtype = loaded.storage_dtype if config.dtype == "auto" else DTYPES[config.dtype]
    layers: list[LayerSpec] = []
    fidelity: dict[str, dict[str, float]] = {name: {} for name in recipes}
    piece = _Workpiece(ladder, batches, config, data, seed, observer)
    if not top.is_full:
        before = _fidelity(ladder, data.validation, metric)
        for step in top.steps[1:]:
            if step.name in _AFTER_ROUNDING:
                _round(student, dtype)
            layers += STEPS[step.name](piece, step)
        _round(student, dtype)  # measure what will be sent
        fidelity = _fidelity(ladder, data.validation, metric)
        for name, recipe in recipes.items():
            fidelity[name] |= {f"{key}_before": value for key, value in before[name].items()}
            observer.message(_fidelity_line(recipe, ladder.kept[name], fidelity[name], metric))
    packages = {}
    contents: dict[str, bytes] = {}  # rungs have parts in common, which are in memory once
    for name, recipe in recipes.items():
        with ladder.rung(name):
            package = pack_emulator(
                student,
                loaded.model,
                blocks,
                ladder.kept[name],
                layers=ladder.specs_of(name, layers),
                kept=piece.kept,
                recipe=str(recipe),
                dtype=dtype,
                parent_sha256=loaded.sha256,
            )
        parts = {sha256: contents.setdefault(sha256, c) for sha256, c in package.parts.items()}
        packages[name] = replace(package, parts=parts).with_fidelity(fidelity[name])
    return packages


def _agreement(
    model: transformers.PreTrainedModel,
    tuned: Sequence[int],
    package: EmulatorPackage,
    data: FederatedData[Examples],
    probe: Probe,
    seed: int,
) -> dict[str, float]:
    """Return how what devices build from a rung's bytes agrees with the full model."""
    computed, manifest = next(model.parameters()), package.manifest
    student = package.build(computed.device, computed.dtype)
    kept = list(manifest.source_blocks)
    ladder = Ladder(model, student, manifest.blocks, {manifest.recipe: kept}, frozenset(tuned))
    with ladder.rung(manifest.recipe) as pair:
        return measure_agreement(
            model,
            student,
            pair.meetings,
            manifest.blocks,
            kept,
            sorted(tuned) or kept,
            data,
            probe,
            narrow=package.kept,
            seed=seed,
        )


def _fidelity(ladder: Ladder, data: Examples, metric: str) -> dict[str, dict[str, float]]:
    """Return what is measured of each rung on the validation split."""
    measured = {}
    for name in ladder.kept:
        with ladder.rung(name) as pair:
            measured[name] = measure_fidelity(pair, data, 16, metric)
    return measured


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round weights to the type that they are sent in; they stay in the one computed in.

    They are put into memory of their own, since they may be the full model's.
    """
    sent = model.state_dict().keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        rounds = tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
        if name in sent and rounds:
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)


def _calibration(
    loaded: LoadedModel, data: FederatedData[Examples], config: EmulatorConfig
) -> list[Batch]:
    """Return some of the server's own examples as inputs of the model."""
    if data.server is None:
        return []
    number = max(1, config.calibration_tokens // data.server.tokens_per_example)
    order = generator(0, "calibration").permutation(data.server.num_examples)[:number]
    device = next(loaded.model.parameters()).device
    batches: list[Batch] = []
    for start in range(0, len(order), config.distill_batch_size):
        rows = order[start : start + config.distill_batch_size]
        batch = batch_of(data.server, rows, device)
        batches.append({**batch.inputs, "labels": batch.labels})
    return batches


def _distill(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    if piece.data.server is None:
        raise EmulatorError(
            "emulator.recipe distills, which needs data of the server; raise data.server_ratio "
            "above 0"
        )
    ladder = piece.ladder
    trainable = ladder.trainable()
    for parameter in trainable:
        parameter.data = parameter.data.clone()  # until now it may be the full model's
    number = len(ladder.kept)
    title = "distil emulator" if number == 1 else f"distil {number} rungs"

    def progress(done: int, total: int, loss: float) -> None:
        piece.observer.progress(title, done, total, f"loss {loss:.3f}")

    with torch.random.fork_rng(devices=[]):
        distill(
            ladder.rungs,
            trainable,
            piece.data.server,
            distill_settings(piece.config, int(step.value)),
            seed=derive_seed(piece.seed, "distill"),
            progress=progress,
        )
    return []


def distill_settings(config: EmulatorConfig, num_tokens: int) -> DistillSettings:
    """Return how emulators are distilled, within a budget of tokens."""
    return DistillSettings(
        num_tokens=num_tokens,
        terms=Terms(
            lm=config.distill_lm_weight,
            hidden=config.distill_hidden_weight,
            logit=config.distill_logit_weight,
            block=config.distill_block_weight,
        ),
        learning_rate=config.distill_learning_rate,
        batch_size=config.distill_batch_size,
    )


def _width(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    return _narrow(piece, step, leave_out_neurons)


def _heads(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    return _narrow(piece, step, leave_out_heads)


def _narrow(piece: _Workpiece, step: Step, leave_out: Callable[..., Narrowed]) -> list[LayerSpec]:
    """Leave something out of the middle blocks, and note what is left of the full model's."""
    ladder = piece.ladder
    done = leave_out(ladder.student, ladder.own, ladder.middle, step.value, piece.batches)
    names = ladder.own.rename(done.kept, ladder.blocks, dict(enumerate(ladder.largest)))
    piece.kept.update(through(piece.kept, {names[n]: own for n, own in done.kept.items()}))
    return done.layers


def _few_bits(piece: _Workpiece, step: Step) -> list[LayerSpec]:
    return store_in_few_bits(piece.ladder.student, "int8" if step.name == "int8" else "int4")


STEPS: Mapping[str, Callable[[_Workpiece, Step], list[LayerSpec]]] = {
    "width": _width,
    "heads": _heads,
    "distill": _distill,
    "int8": _few_bits,
    "int4": _few_bits,
}
_AFTER_ROUNDING = {"int8", "int4"}


def _fidelity_line(
    recipe: Recipe, kept: Sequence[int], fidelity: dict[str, float], metric: str
) -> str:
    return (
        f"emulator {recipe} keeps blocks {', '.join(map(str, kept))}: validation {metric} "
        f"{fidelity[f'{metric}_before']:.4g} -> {fidelity[metric]:.4g}, hidden-state error "
        f"{fidelity['hidden_error_before']:.3f} -> {fidelity['hidden_error']:.3f}"
    )
