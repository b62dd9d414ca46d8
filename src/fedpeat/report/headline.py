"""The one sentence that says what a run achieved, and what must be said with it."""

from __future__ import annotations

import math

from fedpeat.report.quantities import contrast_texts, quality_text, ratio_text
from fedpeat.report.records import RoundRecord, RunData, Summary

__all__ = ["headline", "is_better", "latest_plug_in", "remarks"]

_EMULATED = ("fedpeat", "fed_eat")
_HELD_IT_ALL = ("fed_peft", "fed_ft")
_MOST_NAMED = 8
_MOST_WARNINGS = 5


def is_better(value: float, other: float, metric: str) -> bool:
    """Return whether a quality is strictly better: lower perplexity, higher accuracy."""
    return value < other if metric == "perplexity" else value > other


def latest_plug_in(run: RunData) -> float | None:
    """Return the plug-in quality at the end, or of the last evaluated round so far."""
    if run.summary is not None:
        return run.summary.quality.plug_in
    return next((record.plug_in for record in reversed(run.rounds) if record.is_evaluated), None)


def headline(run: RunData) -> str:
    """Return what the run achieved in one sentence."""
    if run.summary is None:
        return _unfinished(run)
    quality = run.summary.quality
    if run.summary.method == "zero_shot":
        value = quality_text(quality.full_zero_shot, run.metric, 3)
        return f"Zero-shot {run.metric} {value}: nothing was tuned."
    change = _change(quality.plug_in, quality.full_zero_shot, run.metric)
    if not _is_improvement(quality.plug_in, quality.full_zero_shot, run.metric):
        return f"{change}."
    clauses = [clause for clause in (_gap(run.summary), _devices(run.summary)) if clause]
    if not clauses:
        return f"{change}."
    return f"{change}{':' if len(clauses) > 1 else ','} {', '.join(clauses)}."


def _unfinished(run: RunData) -> str:
    if not run.rounds:
        return "Still running or interrupted before the first round."
    start = f"Still running or interrupted after round {run.last_round}"
    value = latest_plug_in(run)
    if value is None or not run.tuning_rounds:
        return f"{start}."
    change = _change(value, run.before_tuning, run.metric)
    return f"{start}: {change[0].lower()}{change[1:]}."


def _is_improvement(value: float | None, before: float | None, metric: str) -> bool:
    known = value is not None and before is not None and math.isfinite(value)
    return known and is_better(value or 0.0, before or 0.0, metric)


def _change(value: float | None, before: float | None, metric: str) -> str:
    if value is None:
        return f"Plug-in {metric} was not measured"
    if not math.isfinite(value):
        return f"Plug-in {metric} is not finite: the tuning diverged"
    if before is None or not math.isfinite(before):
        return f"Plug-in {metric} {quality_text(value, metric, 3)}"
    new, old = contrast_texts(value, before, metric)
    if value == before:
        return f"Plug-in {metric} {new}, unchanged by the tuning"
    direction = f"{'down' if value < before else 'up'} from {old}"
    worse = "" if is_better(value, before, metric) else ": worse than the untouched model"
    return f"Plug-in {metric} {new}, {direction}{worse}"


def _gap(summary: Summary) -> str:
    quality = summary.quality
    gap = quality.gap_closed
    if gap is None or not math.isfinite(gap) or gap <= 0:
        return ""
    if summary.method not in _EMULATED and quality.values.get("full_tuned") == quality.plug_in:
        return ""  # this run is the upper bound itself
    if gap > 1:
        return f"better than full tuning ({ratio_text(gap)} of the gap closed)"
    return f"{ratio_text(gap)} of the gap to full tuning closed"


def _devices(summary: Summary) -> str:
    """Return who tuned; "never held the whole model" is said only where sizes allow it."""
    devices = _number_of_devices(summary.num_clients)
    if summary.method in _HELD_IT_ALL:
        return f"with {devices} that held the full model"
    if summary.method == "centralized":
        return "with all data in one place"
    if summary.method not in _EMULATED or summary.emulator is None:
        return f"with {devices}"
    held, whole = summary.emulator.num_parameters, summary.num_parameters
    if held is None or whole is None or not math.isfinite(held):
        return f"with {devices}"
    if held >= whole:
        return f"with {devices} whose emulator is as large as the model"
    return f"with {devices} that never held the whole model"


def _number_of_devices(count: float | None) -> str:
    if count is None or not math.isfinite(count):
        return "devices"
    return "1 device" if count == 1 else f"{count:,.0f} devices"


def remarks(run: RunData) -> list[str]:
    """Return what a reader must know before trusting the numbers."""
    found = list(run.notes)
    broken = [str(record.server_round) for record in run.rounds if _is_broken(record)]
    if broken:
        found.append(f"Plug-in quality or training loss is not finite in round {_first(broken)}.")
    warnings = [
        f"Round {record.server_round}: {text}" for record in run.rounds for text in record.warnings
    ]
    found += warnings[:_MOST_WARNINGS]
    if len(warnings) > _MOST_WARNINGS:
        found.append(f"{len(warnings) - _MOST_WARNINGS:,} more warnings are in metrics.jsonl.")
    return found


def _is_broken(record: RoundRecord) -> bool:
    values = (record.plug_in, record.train_loss)
    return any(value is not None and not math.isfinite(value) for value in values)


def _first(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
