"""Run several methods over seeds at one token budget, and set them side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeat.config.loading import config_to_yaml, override
from fedpeat.config.schema import ComparisonPlan, Config
from fedpeat.core.errors import AggregationError
from fedpeat.core.run_folder import clean_json, storage_errors, write_atomically
from fedpeat.experiments.observer import Observer, Silent
from fedpeat.experiments.results import gap_closed
from fedpeat.experiments.takeover import making_differs
from fedpeat.report.comparison import comparison_markdown, write_comparison

__all__ = ["compare"]

QUALITIES = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in")
BESIDE_PLUG_IN = {"perplexity": ("bits_per_byte",), "accuracy": ("cross_entropy",)}
COSTS = (
    "bytes_down",
    "bytes_up",
    "peak_rss_bytes",
    "wall_seconds",
    "num_tokens",
    "simulated_seconds",
    "simulated_joules",
    "simulated_bytes",
)


def compare(
    config: Config,
    plan: ComparisonPlan,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> tuple[Path, str]:
    """Run methods and variants of them; what an earlier, interrupted one finished is not run again.

    Each run has a process of its own, so that its peak memory is its own. ``gap_closed`` compares
    with fed_peft of the same seed, if it is among the methods.

    Returns:
        The folder, with comparison.json, .md and .html, and the table as Markdown.

    Raises:
        FedPEATError: If a run fails; its own message was printed by its process.
    """
    folder = Path(config.output_dir) / config.name
    observer = observer or Silent()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    runs = [(method, seed) for method in plan.methods for seed in plan.seeds]
    summaries: dict[tuple[str, int], dict[str, Any]] = {}
    made: list[Config] = []
    for done, (method, seed) in enumerate(runs):
        observer.progress("comparison", done, len(runs), f"{method}, seed {seed}")
        settings = _settings_of(config, plan, method, seed, folder)
        if plan.share_emulators:
            settings = _sharing(settings, [each for each in made if each.seed == seed])
            made.append(settings)
        summaries[method, seed] = _run_in_process(settings, overwrite=overwrite)
    observer.progress("comparison", len(runs), len(runs), "")
    data = _table(plan, summaries)
    write_atomically(
        folder / "comparison.json", json.dumps(json.loads(clean_json(data)), indent=1) + "\n"
    )
    table = comparison_markdown(data)
    write_atomically(folder / "comparison.md", table)
    write_comparison(folder)
    return folder, table


def _settings_of(
    config: Config, plan: ComparisonPlan, name: str, seed: int, folder: Path
) -> Config:
    """Return the settings of a run; a name that is no variant's is a method's."""
    changes = plan.variants.get(name, {"method": name, **plan.overrides.get(name, {})})
    changed = override(config, changes)
    evaluation = replace(changed.evaluation, full_tuned=False)
    return replace(
        changed,
        seed=seed,
        name=f"{name}-seed{seed}",
        output_dir=str(folder),
        evaluation=evaluation,
    )


def _sharing(config: Config, earlier: Sequence[Config]) -> Config:
    """Return settings that take over the emulators of the first run that makes the same ones."""
    for other in earlier:
        if not (other.emulator.taken_from or making_differs(other, config)):
            source = str(Path(other.output_dir) / other.name)
            return replace(config, emulator=replace(config.emulator, taken_from=source))
    return config


def _run_in_process(config: Config, *, overwrite: bool) -> dict[str, Any]:
    folder = Path(config.output_dir) / config.name
    if (folder / "summary.json").exists() and not overwrite:
        finished: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        if (folder / "config.yaml").read_text() == config_to_yaml(config):
            return finished
    settings = folder.with_name(f".{config.name}.yaml")
    write_atomically(settings, config_to_yaml(config))
    mode = "--overwrite" if overwrite else "--resume"
    command = [sys.executable, "-m", "fedpeat", "run", str(settings), mode]
    result = subprocess.run(  # noqa: S603 - our own program
        command, check=False, stdout=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "200"}
    )
    settings.unlink(missing_ok=True)
    if result.returncode != 0:
        raise AggregationError(
            f"{config.method} with seed {config.seed} ended with exit code {result.returncode}"
        )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _table(
    plan: ComparisonPlan, summaries: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    rows, metric = [], next(iter(summaries.values()))["quality"]["metric"]
    beside = BESIDE_PLUG_IN[metric]
    for method in plan.methods:
        own = [summaries[method, seed] for seed in plan.seeds]
        row: dict[str, Any] = {"method": method, "seeds": list(plan.seeds)}
        row |= {name: [s["quality"][name] for s in own] for name in QUALITIES}
        row |= {name: [s["cost"][name] for s in own] for name in COSTS}
        row["gap_closed"] = [_gap(s, summaries.get(("fed_peft", s["seed"]))) for s in own]
        row["emulator_bytes"] = [(s["emulator"] or {}).get("num_bytes") for s in own]
        row |= {name: [s["quality"][name]["plug_in"] for s in own] for name in beside}
        rows.append(row)
    return {"schema": 1, "metric": metric, "num_seeds": len(plan.seeds), "rows": rows}


def _gap(summary: Mapping[str, Any], bound: Mapping[str, Any] | None) -> float | None:
    if bound is None:
        return None
    quality = summary["quality"]
    return gap_closed(
        quality["full_zero_shot"],
        quality["plug_in"],
        bound["quality"]["plug_in"],
        quality["metric"],
    )
