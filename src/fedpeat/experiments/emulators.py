"""Make the emulators of a run: drop blocks, distil if asked, measure, and pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedpeat.config.recipe import Recipe, parse_recipe
from fedpeat.config.schema import EmulatorConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.core.seeds import derive_seed, generator
from fedpeat.data.federation import FederatedText
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.selection import choose_rungs
from fedpeat.experiments.ladder import Ladder
from fedpeat.experiments.observer import Observer
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.loading import DTYPES, LoadedModel
from fedpeat.tuning.distillation import DistillSettings, distill, measure_fidelity
from fedpeat.tuning.loss import batch_of

__all__ = ["distill_settings", "make_emulators", "rung_name"]


def rung_name(ratio: float) -> str:
    """Return the name of a rung: the share of the blocks that it keeps."""
    return f"{ratio:g}"


def make_emulators(
    loaded: LoadedModel,
    blocks: Blocks,
    tuned: Sequence[int],
    config: EmulatorConfig,
    text: FederatedText,
    *,
    seed: int,
    observer: Observer,
) -> dict[str, EmulatorPackage]:
    """Return the emulators of a model by the names of their rungs, the largest first.

    The blocks of a rung are among those of the rung above it, with the same weights.

    Args:
        loaded: The full model, without an adapter.
        blocks: Its block list.
        tuned: Blocks that are kept as they are, since the adapter sits on them; empty if it sits on
            every kept block.
        config: What to keep and how to distil.
        text: The server's text is used to distil, the validation split to measure.
        seed: Seed of distillation.
        observer: Is told the progress, and what fidelity the budget bought.

    Raises:
        EmulatorError: If there is nothing to compress, or no text to distil on.
    """
    top = parse_recipe(config.recipe)
    recipes = {rung_name(ratio): top.at(ratio) for ratio in config.lower_rungs}
    recipes = {rung_name(top.ratio): top, **recipes}
    batches = _calibration(loaded, text, config)
    steps = [recipe.selection for recipe in recipes.values()]
    kept = choose_rungs(steps, loaded.model, blocks, tuned, batches)
    student = build_from_blocks(loaded.model, blocks, kept[0])
    dtype = loaded.storage_dtype if config.dtype == "auto" else DTYPES[config.dtype]
    ladder = Ladder(loaded.model, student, blocks, dict(zip(recipes, kept, strict=True)), tuned)
    fidelity: dict[str, dict[str, float]] = {name: {} for name in recipes}
    if not top.is_full:
        before = _fidelity(ladder, text)
        for step in top.steps:
            if step.name == "distill":
                _distill(ladder, config, int(step.value), text, seed, observer)
        computed = next(loaded.model.parameters()).dtype
        for rounded_to in (dtype, computed):  # measure what will be sent
            torch.nn.Module.to(student, dtype=rounded_to)
        after = _fidelity(ladder, text)
        for name, recipe in recipes.items():
            fidelity[name] = {f"{k}_before": v for k, v in before[name].items()} | after[name]
            observer.message(_fidelity_line(recipe, ladder.kept[name], fidelity[name]))
    packages = {}
    for name, recipe in recipes.items():
        with ladder.rung(name) as pair:
            package = pack_emulator(
                pair.student,
                loaded.model,
                blocks,
                ladder.kept[name],
                recipe=str(recipe),
                dtype=dtype,
                parent_sha256=loaded.sha256,
            )
        packages[name] = package.with_fidelity(fidelity[name])
    return packages


def _fidelity(ladder: Ladder, text: FederatedText) -> dict[str, dict[str, float]]:
    """Return what is measured of each rung on the validation split."""
    measured = {}
    for name in ladder.kept:
        with ladder.rung(name) as pair:
            measured[name] = measure_fidelity(pair, text.validation, 16)
    return measured


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


def _distill(
    ladder: Ladder,
    config: EmulatorConfig,
    num_tokens: int,
    text: FederatedText,
    seed: int,
    observer: Observer,
) -> None:
    if text.server is None:
        raise EmulatorError(
            "emulator.recipe distills, which needs text of the server; raise data.server_ratio "
            "above 0"
        )
    data, settings = text.server, distill_settings(config, num_tokens)
    for name in reversed(list(ladder.kept)):
        title = "distil emulator" if len(ladder.kept) == 1 else f"distil rung {name}"

        def progress(done: int, total: int, loss: float, title: str = title) -> None:
            observer.progress(title, done, total, f"loss {loss:.3f}")

        trainable = ladder.added(name)
        with ladder.rung(name) as pair, torch.random.fork_rng(devices=[]):
            distill(
                pair,
                trainable,
                data,
                settings,
                seed=derive_seed(seed, "distill"),
                progress=progress,
            )


def distill_settings(config: EmulatorConfig, num_tokens: int) -> DistillSettings:
    """Return how emulators are distilled, within a budget of tokens."""
    return DistillSettings(
        num_tokens=num_tokens,
        lm_weight=config.distill_lm_weight,
        hidden_weight=config.distill_hidden_weight,
        learning_rate=config.distill_learning_rate,
        batch_size=config.distill_batch_size,
    )


def _fidelity_line(recipe: Recipe, kept: Sequence[int], fidelity: dict[str, float]) -> str:
    return (
        f"emulator {recipe} keeps blocks {', '.join(map(str, kept))}: validation perplexity "
        f"{fidelity['perplexity_before']:.2f} -> {fidelity['perplexity']:.2f}, hidden-state error "
        f"{fidelity['hidden_error_before']:.3f} -> {fidelity['hidden_error']:.3f}"
    )
