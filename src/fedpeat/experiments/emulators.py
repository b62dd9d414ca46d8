"""Make the emulator of a run: drop blocks, distil if asked, measure, and pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from fedpeat.config.recipe import Recipe, parse_recipe
from fedpeat.config.schema import EmulatorConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.core.seeds import derive_seed, generator
from fedpeat.data.federation import FederatedText
from fedpeat.emulator.calibration import Batch
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.selection import choose_blocks
from fedpeat.experiments.fidelity import Probe, agreement_line, measure_agreement
from fedpeat.experiments.observer import Observer
from fedpeat.model.blocks import Blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.loading import DTYPES, LoadedModel
from fedpeat.tuning.distillation import DistillSettings, Pair, distill, measure_fidelity
from fedpeat.tuning.loss import batch_of

__all__ = ["make_emulator"]


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
    dtype = loaded.storage_dtype if config.dtype == "auto" else DTYPES[config.dtype]
    computed = next(loaded.model.parameters()).dtype
    fidelity: dict[str, float] = {}
    if not recipe.is_full:
        pair = _pair(loaded.model, student, blocks, kept, tuned)
        fidelity = {
            f"{k}_before": v for k, v in measure_fidelity(pair, text.validation, 16).items()
        }
        for step in recipe.steps:
            if step.name == "distill":
                _distill(pair, blocks, kept, tuned, config, int(step.value), text, seed, observer)
        for rounded_to in (dtype, computed):  # measure what will be sent
            torch.nn.Module.to(student, dtype=rounded_to)
        fidelity |= measure_fidelity(pair, text.validation, 16)
        observer.message(_fidelity_line(recipe, kept, fidelity))
    package = pack_emulator(
        student,
        loaded.model,
        blocks,
        kept,
        recipe=str(recipe),
        dtype=dtype,
        parent_sha256=loaded.sha256,
    )
    if not recipe.is_full and probe is not None:
        del pair, student  # what devices build from the bytes takes its place
        sent = package.build(next(loaded.model.parameters()).device, computed)
        pair = _pair(loaded.model, sent, blocks, kept, tuned)
        fidelity |= measure_agreement(
            loaded.model,
            sent,
            (pair.teacher_block, pair.student_block),
            blocks,
            kept,
            tuned or kept,
            text,
            probe,
            seed=seed,
        )
        observer.message(agreement_line(fidelity))
    return package.with_fidelity(fidelity)


def _pair(
    teacher: transformers.PreTrainedModel,
    student: transformers.PreTrainedModel,
    blocks: Blocks,
    kept: Sequence[int],
    tuned: Sequence[int],
) -> Pair:
    """Pair the two at the last block of the middle: after it, both have the same tuned blocks."""
    middle = [i for i in range(blocks.num_blocks) if i not in set(tuned)]
    teacher_last = middle[-1]
    student_last = max(j for j, i in enumerate(kept) if i <= teacher_last)
    return Pair(
        teacher,
        student,
        blocks.output(teacher, teacher_last),
        blocks.select(kept).output(student, student_last),
    )


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
    pair: Pair,
    blocks: Blocks,
    kept: Sequence[int],
    tuned: Sequence[int],
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
    own = blocks.select(kept)
    trainable = [
        p
        for j, i in enumerate(kept)
        if i not in set(tuned)
        for _, part in own.parts(pair.student, j)
        for p in part.parameters()
    ]
    settings = DistillSettings(
        num_tokens=num_tokens,
        lm_weight=config.distill_lm_weight,
        hidden_weight=config.distill_hidden_weight,
        learning_rate=config.distill_learning_rate,
        batch_size=config.distill_batch_size,
    )
    with torch.random.fork_rng(devices=[]):
        distill(
            pair,
            trainable,
            text.server,
            settings,
            seed=derive_seed(seed, "distill"),
            progress=lambda done, total, loss: observer.progress(
                "distil emulator", done, total, f"loss {loss:.3f}"
            ),
        )


def _fidelity_line(recipe: Recipe, kept: Sequence[int], fidelity: dict[str, float]) -> str:
    return (
        f"emulator {recipe} keeps blocks {', '.join(map(str, kept))}: validation perplexity "
        f"{fidelity['perplexity_before']:.2f} -> {fidelity['perplexity']:.2f}, hidden-state error "
        f"{fidelity['hidden_error_before']:.3f} -> {fidelity['hidden_error']:.3f}"
    )
