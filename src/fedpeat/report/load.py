"""Read a run folder into records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedpeat.core.errors import DataError
from fedpeat.report.audit import load_audit
from fedpeat.report.controller import load_trained
from fedpeat.report.fields import Fields, parse_object, read_record, read_text
from fedpeat.report.privacy_audit import load_privacy_audit
from fedpeat.report.records import (
    BESIDE,
    METRICS,
    QUALITIES,
    ROLES,
    STATUSES,
    AdapterFacts,
    Cost,
    EmulatorFacts,
    Participation,
    PrivacyFacts,
    Promise,
    Quality,
    RoundRecord,
    RunData,
    Spent,
    Summary,
)

__all__ = ["load_run", "load_summary", "parse_round", "require_run_folder"]

_FILES = ("config.yaml", "metrics.jsonl", "summary.json")
_REFERENCE = "full_tuned"
_ALWAYS = ("full_zero_shot", "plug_in")
"""Qualities that every finished run measures."""
_CUT_OFF = (
    "The last line of metrics.jsonl is cut off, as an interruption leaves it, and was left out."
)


def load_run(run_dir: Path) -> RunData:
    """Return what a run folder says; without summary.json it is still running or interrupted.

    Args:
        run_dir: The folder, ``runs/NAME``; its sub-folder ``full_tuned``, if there is one, becomes
            the reference.

    Raises:
        DataError: If there is no such folder, it is no run folder, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    require_run_folder(run_dir, _FILES)
    reference = run_dir / _REFERENCE
    return _load_folder(
        run_dir, _load_folder(reference, None) if _is_run_folder(reference) else None
    )


def require_run_folder(run_dir: Path, names: Sequence[str]) -> None:
    """Check that a folder is one of a run, by files of which it has at least one.

    Raises:
        DataError: If it is none.
    """
    if not run_dir.is_dir():
        got = "a file" if run_dir.exists() else "no such folder"
        raise DataError(f"{run_dir}: must be a run folder, got {got}")
    if not any((run_dir / name).is_file() for name in names):
        raise DataError(
            f"{run_dir}: must be a run folder with one of {', '.join(names)}, got none of them"
        )


def _is_run_folder(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _FILES)


def _load_folder(folder: Path, reference: RunData | None) -> RunData:
    config, metrics, summary_path = (folder / name for name in _FILES)
    summary = load_summary(summary_path)
    lines = _Lines(metrics, is_running=summary is None) if metrics.is_file() else None
    rounds = lines.rounds() if lines else ()
    return RunData(
        name=folder.resolve().name,
        metric=_metric(summary, lines, metrics),
        # shown, never parsed: a stray byte must not cost the report
        config_text=config.read_bytes().decode("utf-8", "replace") if config.is_file() else None,
        rounds=rounds,
        summary=summary,
        reference=reference,
        audit=load_audit(folder),
        privacy_audit=load_privacy_audit(folder),
        trained=load_trained(folder),
        notes=lines.notes() if lines else (),
    )


def load_summary(path: Path) -> Summary | None:
    """Return summary.json, None where there is none; DataError if it is damaged."""
    fields = read_record(path)
    return None if fields is None else _summary(fields)


def parse_round(line: str, where: str) -> tuple[RoundRecord, str | None]:
    """Return a line of metrics.jsonl, and the metric of its quality if the round was evaluated.

    Raises:
        DataError: If it is no such line.
    """
    fields = parse_object(line, where)
    quality = fields.child("quality")
    metric = None if quality is None else quality.choice("metric", METRICS)
    return _round(fields, quality), metric


def _metric(summary: Summary | None, lines: _Lines | None, path: Path) -> str:
    found = set(lines.metrics) if lines else set()
    if summary is not None:
        found.add(summary.quality.metric)
    if len(found) > 1:
        got = ", ".join(sorted(found))
        raise DataError(f"{path}: quality.metric must be the same throughout a run, got {got}")
    return found.pop() if found else METRICS[0]


class _Lines:
    """The lines of metrics.jsonl."""

    def __init__(self, path: Path, *, is_running: bool) -> None:
        text = read_text(path)
        self.path = path
        self.metrics: set[str] = set()
        self._lines = text.split("\n")
        self._is_cut_off = is_running and not _is_json(self._lines[-1])
        if self._is_cut_off:
            self._lines.pop()

    def notes(self) -> tuple[str, ...]:
        return (_CUT_OFF,) if self._is_cut_off else ()

    def rounds(self) -> tuple[RoundRecord, ...]:
        # a resumed run may write rounds again: the last line of a round counts
        by_round = {record.server_round: record for record in self._records()}
        return tuple(by_round[server_round] for server_round in sorted(by_round))

    def _records(self) -> Iterator[RoundRecord]:
        for number, line in enumerate(self._lines, start=1):
            if line.strip():
                record, metric = parse_round(line, f"{self.path}, line {number}")
                if metric is not None:
                    self.metrics.add(metric)
                yield record


def _is_json(text: str) -> bool:
    if not text.strip():
        return True
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _beside(quality: Fields) -> float | None:
    return quality.number(f"plug_in_{BESIDE[quality.choice('metric', METRICS)]}")


def _round(fields: Fields, quality: Fields | None) -> RoundRecord:
    return RoundRecord(
        server_round=fields.whole("server_round"),
        is_evaluated=quality is not None,
        plug_in=quality.measured("plug_in") if quality else None,
        plug_in_beside=_beside(quality) if quality else None,
        train_loss=fields.number("train_loss"),
        update_norm=fields.number("update_norm"),
        product_error=fields.amount("product_error"),
        participants=tuple(_participation(item) for item in fields.children("participants")),
        bytes_down=fields.amount("bytes_down"),
        bytes_up=fields.amount("bytes_up"),
        num_tokens=fields.amount("num_tokens"),
        seconds=fields.amount("seconds"),
        elapsed_seconds=fields.amount("elapsed_seconds"),
        peak_rss_bytes=fields.amount("peak_rss_bytes"),
        simulated=_spent(fields.child("simulated") or Fields({}, fields.where)),
        set_aside=fields.texts("set_aside"),
        warnings=fields.texts("warnings"),
    )


def _spent(fields: Fields) -> Spent:
    return fields.amount("seconds"), fields.amount("joules"), fields.amount("bytes")


def _participation(fields: Fields) -> Participation:
    return Participation(
        client_id=fields.text("client_id"),
        role=fields.choice("role", ROLES),
        status=fields.choice("status", STATUSES),
        reason=fields.text("reason"),
        num_examples=fields.amount("num_examples"),
        weight=fields.number("weight"),
        first_loss=fields.number("first_loss"),
        last_loss=fields.number("last_loss"),
        num_tokens=fields.amount("num_tokens"),
        seconds=fields.amount("seconds"),
        bytes_down=fields.amount("bytes_down"),
        bytes_up=fields.amount("bytes_up"),
        rung=fields.text("rung"),
        bytes_emulator=fields.amount("bytes_emulator"),
    )


def _summary(fields: Fields) -> Summary:
    quality = fields.child("quality")
    if quality is None:
        raise fields.fault("quality", "an object")
    return Summary(
        method=fields.text("method"),
        model=fields.text("model"),
        quality=_quality(quality),
        num_parameters=fields.amount("num_parameters"),
        seed=fields.number("seed"),
        num_rounds=fields.amount("num_rounds"),
        num_clients=fields.amount("num_clients"),
        best_round=fields.amount("best_round"),
        emulator=_emulator(fields.child("emulator")),
        adapter=_adapter(fields.child("adapter")),
        privacy=_privacy(fields.child("privacy")),
        cost=_cost(fields.child("cost") or Fields({}, fields.where)),
        versions=_versions(fields.child("versions")),
    )


def _quality(fields: Fields) -> Quality:
    metric = fields.choice("metric", METRICS)
    beside = fields.child(BESIDE[metric])
    return Quality(
        metric=metric,
        values={
            name: fields.measured(name) if name in _ALWAYS else fields.number(name)
            for name in QUALITIES
        },
        beside={name: beside.number(name) for name in QUALITIES} if beside else {},
        gap_closed=fields.number("gap_closed"),
    )


def _emulator(fields: Fields | None) -> EmulatorFacts | None:
    if fields is None:
        return None
    fidelity = fields.child("fidelity")
    return EmulatorFacts(
        fields.text("recipe"),
        fields.amount("num_parameters"),
        fields.amount("num_bytes"),
        {name: fidelity.number(name) for name in fidelity.values} if fidelity else {},
    )


def _adapter(fields: Fields | None) -> AdapterFacts | None:
    if fields is None:
        return None
    return AdapterFacts(
        fields.text("peft"), fields.amount("num_parameters"), fields.amount("num_bytes")
    )


def _privacy(fields: Fields | None) -> PrivacyFacts | None:
    if fields is None:
        return None
    levels = [(name, fields.child(name)) for name in ("example", "client")]
    return PrivacyFacts(
        fields.number("delta"),
        fields.choice("noise", ("secret", "seed")) == "secret",
        tuple(_promise(name, found) for name, found in levels if found),
    )


def _promise(level: str, fields: Fields) -> Promise:
    return Promise(
        unit=fields.text("unit") if level == "example" else "device",
        epsilon=fields.number("epsilon"),
        noise_multiplier=fields.number("noise_multiplier"),
        clip_norm=fields.number("clip_norm"),
        sample_rate=fields.number("sample_rate"),
    )


def _cost(fields: Fields) -> Cost:
    return Cost(
        bytes_down=fields.amount("bytes_down"),
        bytes_up=fields.amount("bytes_up"),
        wall_seconds=fields.amount("wall_seconds"),
        peak_rss_bytes=fields.amount("peak_rss_bytes"),
        tokens_per_second=fields.amount("tokens_per_second"),
        simulated_seconds=fields.amount("simulated_seconds"),
        simulated_joules=fields.amount("simulated_joules"),
        simulated_bytes=fields.amount("simulated_bytes"),
    )


def _versions(fields: Fields | None) -> dict[str, str]:
    values = fields.values if fields else {}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }
