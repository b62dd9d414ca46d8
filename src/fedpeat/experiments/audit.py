"""Audit emulators: what they hold of the model, and what an attacker gets back from them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from fedpeat.config.schema import AuditPlan
from fedpeat.core.errors import ConfigError, EmulatorError
from fedpeat.core.run_folder import clean_json, storage_errors, write_atomically
from fedpeat.core.seeds import derive_seed
from fedpeat.emulator.exposure import NEAR, exposure
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.emulator.recovery import (
    from_scratch,
    misses_blocks,
    reinserted,
    trainable,
)
from fedpeat.experiments.audit_inputs import AuditText, Suspect, audit_text, find_suspects
from fedpeat.experiments.observer import Observer, Silent
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.results import versions
from fedpeat.experiments.verdicts import verdicts
from fedpeat.model.loading import LoadedModel
from fedpeat.report.page import write_report
from fedpeat.report.pareto import write_pareto
from fedpeat.tuning.evaluation import Quality, evaluate
from fedpeat.tuning.recovery import Budget, Reached, recover

__all__ = ["ATTACKS", "audit", "capability_ratio"]

_LEAST_TAKEN = 0.01
"""Share of a model's capability that compression must take before what is regained is told."""

METRIC = "perplexity"
Start = Callable[[EmulatorPackage, torch.device, int], transformers.PreTrainedModel]

ATTACKS: Mapping[str, Start] = {
    "from_scratch": from_scratch,
    "fine_tune": lambda package, device, _seed: trainable(package, device),
    "reinsert": reinserted,
}
"""Where each attack starts from; ``from_scratch`` has no emulator and is what the others are
measured against."""


def capability_ratio(value: Quality, floor: Quality, full: Quality) -> float | None:
    """Return (log ppl floor - log ppl) / (log ppl floor - log ppl full); None where that is 0 / 0.

    With a random network of the emulator's shape as the floor this is the capability that an
    untouched emulator leaks: 0 for one that is no better than random, 1 for one as good as the full
    model, below 0 where its loss was raised on purpose. With a network trained from scratch on the
    attacker's text as the floor it is the capability that an attack recovers beyond what the text
    alone would give; with the untouched emulator as the floor, what it regains of that which
    compression took.

    Source:
        LLEOT (ACL Findings 2026), capability privacy leakage, CPL = S(E) / S(M) with the zero-shot
        score S. A perplexity is no such score: its floor is not 0 and it has no upper end. So we
        take as score the log perplexity gained over the floor (ours).
    """
    losses = [_loss(quality) for quality in (floor, value, full)]
    if not math.isfinite(sum(losses)) or losses[0] <= losses[2]:
        return None
    return (losses[0] - losses[1]) / (losses[0] - losses[2])


def audit(
    paths: Sequence[Path],
    plan: AuditPlan,
    *,
    model: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> tuple[list[dict[str, Any]], Path | None]:
    """Audit the emulators of some runs, and set them side by side where there are several.

    Each run gets an ``audit.json``, whose content is returned, and its report anew. What was
    audited before with the same settings is not audited again.

    Args:
        paths: Run folders, or folders of emulators.
        plan: The attacker's text and budget.
        model: The full model's name, if not that of the run's settings.
        out: Folder of the chart over several runs; that of the first run if not given.
        overwrite: Audit again what was audited before.
        observer: Is told how it goes.

    Returns:
        What each audit.json says, and the page with the chart, if there is one.

    Raises:
        FedPEATError: One clear line where a folder, the model or the text does not fit.
    """
    observer = observer or Silent()
    suspects = [find_suspects(path, model) for path in paths]
    _check_comparable(suspects)
    results, written = [], []
    for suspect in suspects:
        path = suspect.home / "audit.json"
        result = None if overwrite else _earlier(path, suspect, plan)
        if result is None:
            result = _audited(suspect, plan, observer)
            write_atomically(path, json.dumps(json.loads(clean_json(result)), indent=1) + "\n")
        else:
            observer.message(f"{path} is there already, with these settings")
        if suspect.is_run:
            write_report(suspect.home)
        results.append(result)
        written.append(suspect.home)
    if len(written) < 2:
        return results, None
    out = out or written[0].resolve().parent
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    return results, write_pareto(written, out)


def _check_comparable(suspects: Sequence[Suspect]) -> None:
    """Check that several emulators can be set side by side, before hours go into their attacks."""
    for place, suspect in enumerate(suspects):
        if len(suspects) > 1 and not suspect.is_run:
            raise ConfigError(f"several emulators must each be of a run, got {suspect.home}")
        if suspect.home.resolve() in [other.home.resolve() for other in suspects[:place]]:
            raise ConfigError(f"each run can be named once, got {suspect.home} twice")


def _earlier(path: Path, suspect: Suspect, plan: AuditPlan) -> dict[str, Any] | None:
    """Return an earlier audit of the same emulators with the same settings."""
    try:
        earlier: dict[str, Any] = json.loads(path.read_text())
        known = [emulator["sha256"] for emulator in earlier["emulators"]]
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        return None
    now = [package.manifest.sha256 for package in suspect.packages.values()]
    same = earlier.get("settings") == json.loads(clean_json(asdict(plan))) and known == now
    return earlier if same else None


def _audited(suspect: Suspect, plan: AuditPlan, observer: Observer) -> dict[str, Any]:
    start = time.perf_counter()
    observer.message(f"loading model {suspect.config.model.name}")
    loaded = load_full_model(suspect.config)
    suspect.check_model(loaded.sha256)
    text = audit_text(suspect, plan, loaded.processor, observer)
    device, num_parameters = next(loaded.model.parameters()).device, loaded.num_parameters
    full = evaluate(loaded.model, text.held_out, plan.batch_size)
    still = [_looked_at(package, loaded, text, plan) for package in suspect.packages.values()]
    del loaded  # an attacker has none
    emulators = []
    for (name, package), (seen, untouched) in zip(suspect.packages.items(), still, strict=True):
        attacks = _attacks(name, package, text, plan, device, observer)
        record = {"name": name, **seen, **_recovered(attacks, untouched, full)}
        emulators.append({**record, "verdicts": verdicts(record, plan)})
        for line in emulators[-1]["verdicts"]:
            observer.message(f"{name}: {line}")
    return {
        "schema": 1,
        "metric": METRIC,
        "model": suspect.config.model.name,
        "num_parameters": num_parameters,
        "settings": asdict(plan),
        "public_text": {"source": plan.public_text, "num_tokens": text.public.num_tokens},
        "held_out": {"source": text.held_out_name, "num_tokens": text.held_out.num_tokens},
        "emulators": emulators,
        "wall_seconds": time.perf_counter() - start,
        "versions": versions(),
    }


def _looked_at(
    package: EmulatorPackage, loaded: LoadedModel, text: AuditText, plan: AuditPlan
) -> tuple[dict[str, Any], Quality]:
    """Return what can be told of an emulator beside the full model, without an attack."""
    manifest, where = package.manifest, next(loaded.model.parameters())
    emulator = package.build(where.device, where.dtype)
    quality = evaluate(emulator, text.held_out, plan.batch_size)
    open_weights = exposure(manifest, emulator, loaded.model)
    whole = open_weights.num_parameters
    seen = {
        "recipe": manifest.recipe,
        "sha256": manifest.sha256,
        "num_parameters": manifest.num_parameters,
        "num_bytes": manifest.num_bytes,
        "fidelity": dict(manifest.fidelity),
        "verbatim": {
            "equal_ratio": open_weights.num_equal / whole,
            "near_ratio": open_weights.num_near / whole,
            "near_distance": NEAR,
        },
    }
    return seen, quality


def _attacks(
    name: str,
    package: EmulatorPackage,
    text: AuditText,
    plan: AuditPlan,
    device: torch.device,
    observer: Observer,
) -> dict[str, tuple[float, list[Reached]]]:
    """Return the best learning rate of each attack, and what it reached."""
    found = {}
    for attack, start in ATTACKS.items():
        if attack == "reinsert" and not misses_blocks(package):
            continue
        found[attack] = _best(f"{name}: {attack}", start, package, text, plan, device, observer)
    return found


def _best(
    label: str,
    start: Start,
    package: EmulatorPackage,
    text: AuditText,
    plan: AuditPlan,
    device: torch.device,
    observer: Observer,
) -> tuple[float, list[Reached]]:
    """Make one attack with each learning rate; the one that ever got best counts."""
    outcomes: list[tuple[float, list[Reached]]] = []
    failed: EmulatorError | None = None
    for rate in plan.learning_rates:
        budget = Budget(plan.num_tokens, plan.batch_size, rate)

        def progress(done: int, total: int, loss: float, rate: float = rate) -> None:
            observer.progress(f"{label}, rate {rate:g}", done, total, f"loss {loss:.3f}")

        try:
            reached = recover(
                start(package, device, derive_seed(plan.seed, "random network")),
                text.public,
                text.held_out,
                budget,
                seed=derive_seed(plan.seed, "attack"),
                progress=progress,
            )
        except EmulatorError as error:
            failed = EmulatorError(f"{label}: {error}")
            observer.message(str(failed))
        else:
            outcomes.append((rate, reached))
    if not outcomes:
        assert failed is not None
        raise failed
    return min(outcomes, key=lambda outcome: _loss(_best_quality(outcome[1][1:])))


def _recovered(
    attacks: Mapping[str, tuple[float, list[Reached]]], untouched: Quality, full: Quality
) -> dict[str, Any]:
    """Return capability and attacks of an emulator, as in audit.json.

    An attacker keeps the best network on his way, and so does who trains one from scratch.
    """
    scratch = attacks["from_scratch"][1]
    floor = _best_quality(scratch)
    records: dict[str, Any] = dict.fromkeys(ATTACKS)
    for name, (rate, reached) in attacks.items():
        best = _best_quality(reached)
        has_emulator = name != "from_scratch"
        records[name] = {
            "learning_rate": rate,
            "perplexity": best.perplexity,
            "recovered_ratio": capability_ratio(best, floor, full) if has_emulator else None,
            "regained_ratio": _regained(best, untouched, floor, full) if has_emulator else None,
            "curve": [_point(*pair, full) for pair in zip(reached, scratch, strict=True)],
        }
    known = [r["recovered_ratio"] for r in records.values() if r is not None]
    return {
        "capability": {
            "full": full.perplexity,
            "emulator": untouched.perplexity,
            "random": scratch[0].quality.perplexity,
            "leaked_ratio": capability_ratio(untouched, scratch[0].quality, full),
        },
        "attacks": records,
        "recovered_ratio": max((ratio for ratio in known if ratio is not None), default=None),
    }


def _regained(best: Quality, untouched: Quality, floor: Quality, full: Quality) -> float | None:
    """Return the share of what compression took that an attack regains; None where it took none.

    It took none to speak of where the emulator covers all but a hundredth of the way from the floor
    to the full model; a share of so little would be noise.
    """
    covered = capability_ratio(untouched, floor, full)
    if covered is None or covered > 1 - _LEAST_TAKEN:
        return None
    return capability_ratio(best, untouched, full)


def _best_quality(reached: Sequence[Reached]) -> Quality:
    return min((point.quality for point in reached), key=_loss)


def _loss(quality: Quality) -> float:
    """Return the loss per token [nat]; infinite, and so never the best, where it is not finite."""
    return quality.nll / quality.num_tokens if math.isfinite(quality.nll) else math.inf


def _point(reached: Reached, scratch: Reached, full: Quality) -> dict[str, Any]:
    return {
        "num_tokens": reached.num_tokens,
        "perplexity": reached.quality.perplexity,
        "recovered_ratio": capability_ratio(reached.quality, scratch.quality, full),
    }
