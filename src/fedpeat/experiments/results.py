"""The result of a run: what its summary says."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from fedpeat.adapter.slices import sliced
from fedpeat.adapter.tunable import adapter_facts
from fedpeat.config.recipe import parse_recipe
from fedpeat.core.version import VERSION
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.bench import Bench
from fedpeat.experiments.privacy import privacy_facts
from fedpeat.experiments.progress import Progress
from fedpeat.federated.rounds import is_better, peak_rss_bytes
from fedpeat.tuning.evaluation import BESIDE, Quality, evaluate

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
        "num_clients": len(bench.client_ids),
        "best_round": _best_round(progress),
        "emulator": _emulator_facts(bench.package) if _is_compressed(bench) else None,
        "rungs": _rungs(bench, progress),
        "set_aside": list(progress.history[-1]["set_aside"]),
        "privacy": privacy_facts(config, len(bench.client_ids), progress.history),
        "adapter": {"peft": config.adapter.method, **adapter_facts(progress.best)},
        "quality": quality_table(_scores(bench, progress), bench.task.metric),
        "cost": _costs(progress, setup_seconds),
        "versions": versions(),
    }


def _is_compressed(bench: Bench) -> bool:
    return bench.package is not None and not parse_recipe(bench.config.emulator.recipe).is_full


def _scores(bench: Bench, progress: Progress) -> dict[str, Quality | None]:
    test, batch_size = bench.data.test, bench.config.evaluation.batch_size
    scores: dict[str, Quality | None] = dict.fromkeys(QUALITIES)
    scores["full_zero_shot"] = bench.zero_shot
    scores["plug_in"] = evaluate(bench.server.model, test, batch_size)
    if bench.package is not None and _is_compressed(bench):
        untouched = bench.package.build(bench.server.device, bench.dtype)
        scores["emulator_zero_shot"] = evaluate(untouched, test, batch_size)
        tuned = bench.shelf.get(bench.package.manifest.sha256)
        tuned.load(sliced(progress.best, bench.slices_of(bench.package)))
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
        **{
            f"simulated_{name}": _simulated(rounds, name) for name in ("seconds", "joules", "bytes")
        },
    }


def _simulated(rounds: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the sum of a cost in the simulated world; None where there was none."""
    costs = [line["simulated"][name] for line in rounds if line["simulated"]]
    return sum(costs) if costs else None


def quality_table(scores: Mapping[str, Quality | None], metric: str) -> dict[str, Any]:
    """Return the quality part of a summary from the scores of the five qualities."""
    table: dict[str, Any] = {"metric": metric}
    table |= {name: score.value(metric) if score else None for name, score in scores.items()}
    table["gap_closed"] = gap_closed(
        table["full_zero_shot"], table["plug_in"], table["full_tuned"], metric
    )
    for beside in BESIDE[metric]:
        table[beside] = {
            name: score.beside(metric)[beside] if score else None for name, score in scores.items()
        }
    return table


def gap_closed(
    zero_shot: float, plug_in: float, full_tuned: float | None, metric: str = "perplexity"
) -> float | None:
    """Return (ZS - plug-in) / (ZS - full tuned), of the logarithms where these are perplexities.

    Returns:
        The share; None without a gain to share.
    """
    if full_tuned is None or not math.isfinite(zero_shot + plug_in + full_tuned):
        return None
    if not is_better(metric, full_tuned, zero_shot):
        return None
    start, reached, bound = (
        math.log(value) if metric == "perplexity" else value
        for value in (zero_shot, plug_in, full_tuned)
    )
    return (start - reached) / (start - bound)


def versions() -> dict[str, str]:
    """Return the versions of what computed the result."""
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return {"fedpeat": VERSION, "python": platform.python_version(), **libraries}


def _best_round(progress: Progress) -> int:
    for line in progress.history:
        if line["quality"] is not None and line["quality"]["plug_in"] == progress.best_quality:
            return int(line["server_round"])
    return 0


def mean_summary(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one summary of several: means of quality (geometric of perplexity), sums of costs."""

    def mean(tables: list[Mapping[str, Any]], name: str, *, of_logarithms: bool) -> float | None:
        values = [table[name] for table in tables]
        if any(value is None for value in values):
            return None
        return math.exp(np.mean(np.log(values))) if of_logarithms else float(np.mean(values))

    summary = dict(summaries[0])
    metric = summary["quality"]["metric"]
    quality: dict[str, Any] = {"metric": metric, "gap_closed": None}
    for name in QUALITIES:
        tables = [s["quality"] for s in summaries]
        quality[name] = mean(tables, name, of_logarithms=metric == "perplexity")
    for part in BESIDE[metric]:
        tables = [s["quality"][part] for s in summaries]
        is_geometric = part == "perplexity_per_byte"
        quality[part] = {n: mean(tables, n, of_logarithms=is_geometric) for n in QUALITIES}
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
        "privacy": _most_spent([s["privacy"] for s in summaries]),
        "quality": quality,
        "cost": cost,
    }


def _most_spent(promises: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the promise to the examples of the device that spent most."""
    made = [promise for promise in promises if promise is not None]
    return max(made, key=lambda promise: promise["example"]["epsilon"], default=None)


def _together(rungs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one rung of several runs, their devices and bytes added."""
    return {**rungs[0], **{k: sum(r[k] for r in rungs) for k in ("num_clients", *_BYTES)}}
