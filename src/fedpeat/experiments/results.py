"""The result of a run: what its summary says."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from fedpeat import __version__
from fedpeat.adapter.tunable import adapter_facts
from fedpeat.config.recipe import parse_recipe
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.bench import Bench
from fedpeat.experiments.progress import METRIC, Progress
from fedpeat.federated.rounds import peak_rss_bytes
from fedpeat.tuning.evaluation import Quality, evaluate

__all__ = ["gap_closed", "mean_summary", "quality_table", "summarize", "versions"]

_BYTES = ("bytes_down", "bytes_up", "bytes_emulator")
QUALITIES = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")


def summarize(bench: Bench, progress: Progress, setup_seconds: float) -> dict[str, Any]:
    """Score the best adapter on the test split and say what it cost, as in summary.json."""
    config = bench.config
    return {
        "schema": 1,
        "method": config.method,
        "model": config.model.name,
        "num_parameters": bench.loaded.num_parameters,
        "seed": config.seed,
        "num_rounds": progress.state.server_round,
        "num_clients": len(bench.text.clients),
        "best_round": _best_round(progress),
        "emulator": _emulator_facts(bench.package) if _is_compressed(bench) else None,
        "rungs": _rungs(bench, progress),
        "adapter": {"peft": config.adapter.method, **adapter_facts(progress.best)},
        "quality": quality_table(_scores(bench, progress)),
        "cost": _costs(progress, setup_seconds),
        "versions": versions(),
    }


def _is_compressed(bench: Bench) -> bool:
    return bench.package is not None and not parse_recipe(bench.config.emulator.recipe).is_full


def _scores(bench: Bench, progress: Progress) -> dict[str, Quality | None]:
    test, batch_size = bench.text.test, bench.config.evaluation.batch_size
    scores: dict[str, Quality | None] = dict.fromkeys(QUALITIES)
    scores["full_zero_shot"] = bench.zero_shot
    scores["plug_in"] = evaluate(bench.server.model, test, batch_size)
    if bench.package is not None and _is_compressed(bench):
        untouched = bench.package.build(bench.server.device, bench.dtype)
        scores["emulator_zero_shot"] = evaluate(untouched, test, batch_size)
        tuned = bench.shelf.get(bench.package.manifest.sha256)
        tuned.load(progress.best)
        scores["emulator_tuned"] = evaluate(tuned.model, test, batch_size)
    if bench.config.method == "fed_peft":
        scores["full_tuned"] = scores["plug_in"]
    return scores


def _emulator_facts(package: EmulatorPackage | None) -> dict[str, Any] | None:
    if package is None:
        return None
    manifest = package.manifest
    return {
        "recipe": manifest.recipe,
        "num_parameters": manifest.num_parameters,
        "num_bytes": manifest.num_bytes,
        "num_blocks": len(manifest.source_blocks),
        "num_source_blocks": manifest.blocks.num_blocks,
        "fidelity": dict(manifest.fidelity),
    }


def _rungs(bench: Bench, progress: Progress) -> list[dict[str, Any]]:
    """Return what each rung of the ladder is and cost, the largest first."""
    rungs = []
    for name, package in bench.packages.items():
        on_it = [p for line in progress.history for p in line["participants"] if p["rung"] == name]
        sums = {key: sum(p[key] for p in on_it) for key in _BYTES}
        num_clients = len({p["client_id"] for p in on_it})
        facts = _emulator_facts(package) or {}
        rungs.append({"name": name, **facts, "num_clients": num_clients, **sums})
    return rungs


def _costs(progress: Progress, setup_seconds: float) -> dict[str, Any]:
    rounds = progress.history
    round_seconds = sum(line["seconds"] for line in rounds)
    num_tokens = sum(line["num_tokens"] for line in rounds)
    return {
        "bytes_down": sum(line["bytes_down"] for line in rounds),
        "bytes_up": sum(line["bytes_up"] for line in rounds),
        "num_tokens": num_tokens,
        "wall_seconds": setup_seconds + rounds[-1]["elapsed_seconds"],
        "peak_rss_bytes": peak_rss_bytes(),
        "tokens_per_second": num_tokens / round_seconds if round_seconds else None,
        "simulated_seconds": None,
        "simulated_joules": None,
    }


def quality_table(scores: Mapping[str, Quality | None]) -> dict[str, Any]:
    """Return the quality part of a summary from the scores of the five qualities."""
    table: dict[str, Any] = {"metric": METRIC}
    table |= {name: score.perplexity if score else None for name, score in scores.items()}
    table["gap_closed"] = gap_closed(table["full_zero_shot"], table["plug_in"], table["full_tuned"])
    table["bits_per_byte"] = {
        name: score.bits_per_byte if score else None for name, score in scores.items()
    }
    table["perplexity_per_byte"] = {
        n: score.byte_perplexity if score else None for n, score in scores.items()
    }
    return table


def gap_closed(zero_shot: float, plug_in: float, full_tuned: float | None) -> float | None:
    """Return (log ZS - log plug-in) / (log ZS - log full tuned); None without a gain to share."""
    if (
        full_tuned is None
        or not math.isfinite(zero_shot + plug_in + full_tuned)
        or full_tuned >= zero_shot
    ):
        return None
    return (math.log(zero_shot) - math.log(plug_in)) / (math.log(zero_shot) - math.log(full_tuned))


def versions() -> dict[str, str]:
    """Return the versions of what computed the result."""
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return {"fedpeat": __version__, "python": platform.python_version(), **libraries}


def _best_round(progress: Progress) -> int:
    for line in progress.history:
        if line["quality"] is not None and line["quality"]["plug_in"] == progress.best_quality:
            return int(line["server_round"])
    return 0


def mean_summary(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(tables: list[Mapping[str, Any]], name: str, *, of_logarithms: bool) -> float | None:
        values = [table[name] for table in tables]
        if any(value is None for value in values):
            return None
        return math.exp(np.mean(np.log(values))) if of_logarithms else float(np.mean(values))

    summary = dict(summaries[0])
    quality = {"metric": METRIC, "gap_closed": None}
    for name in QUALITIES:
        quality[name] = mean([s["quality"] for s in summaries], name, of_logarithms=True)  # type: ignore[assignment]
    for part, of_logarithms in (("bits_per_byte", False), ("perplexity_per_byte", True)):
        tables = [s["quality"][part] for s in summaries]
        quality[part] = {n: mean(tables, n, of_logarithms=of_logarithms) for n in QUALITIES}  # type: ignore[assignment]
    costs = [s["cost"] for s in summaries]
    added = {
        n: sum(c[n] for c in costs)
        for n in ("bytes_down", "bytes_up", "num_tokens", "wall_seconds")
    }
    rungs = [_together(list(same)) for same in zip(*(s["rungs"] for s in summaries), strict=True)]
    cost = {**costs[0], **added, "peak_rss_bytes": max(c["peak_rss_bytes"] for c in costs)}
    return {
        **summary,
        "method": "local",
        "num_clients": len(summaries),
        "rungs": rungs,
        "quality": quality,
        "cost": cost,
    }


def _together(rungs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one rung of several runs, their devices and bytes added."""
    return {**rungs[0], **{k: sum(r[k] for r in rungs) for k in ("num_clients", *_BYTES)}}
