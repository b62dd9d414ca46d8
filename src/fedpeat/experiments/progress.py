"""Where a run stands: its start, its rounds, and its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedpeat.adapter.lora import State
from fedpeat.core.errors import CheckpointError
from fedpeat.core.records import Controller, RoundResult
from fedpeat.core.run_folder import Checkpoint
from fedpeat.core.wire import Payload
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.bench import Bench
from fedpeat.experiments.observer import Observer
from fedpeat.experiments.realign import realigned
from fedpeat.federated.aggregation import LoraAggregation
from fedpeat.federated.rounds import Federation, FederationState, is_better, peak_rss_bytes
from fedpeat.federated.shelf import Rung
from fedpeat.tuning.evaluation import Quality, evaluate

__all__ = ["Progress", "aligned_anew", "begun", "checkpoint_of", "one_round", "resumed"]

SCHEMA = 7
"""Form of what a checkpoint holds; it is raised whenever ``checkpoint_of`` writes other things."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all of it goes into the checkpoint."""

    state: FederationState
    best: Mapping[str, np.ndarray]
    best_quality: float | None
    history: tuple[dict[str, Any], ...]


def begun(bench: Bench) -> Progress:
    """Return the start: a fresh adapter, its quality measured, nothing sent yet."""
    adapter, metric = bench.server.state(), bench.task.metric
    quality = evaluate(
        bench.server.model, bench.data.validation, bench.config.evaluation.batch_size
    )
    line = asdict(
        RoundResult(
            server_round=0,
            quality=_quality_record(quality, metric),
            peak_rss_bytes=peak_rss_bytes(),
        )
    )
    return Progress(FederationState(0, adapter), adapter, quality.value(metric), (line,))


def one_round(
    bench: Bench, federation: Federation, progress: Progress, observer: Observer
) -> Progress:
    num_rounds, every = bench.config.federated.num_rounds, bench.config.evaluation.every
    start = time.perf_counter()
    state, result = federation.run_round(progress.state, _last_loss(progress, bench.task.metric))
    best, best_quality, record = progress.best, progress.best_quality, None
    if state.server_round % every == 0 or state.server_round == num_rounds:
        bench.server.load(state.adapter)
        quality = evaluate(
            bench.server.model, bench.data.validation, bench.config.evaluation.batch_size
        )
        metric = bench.task.metric
        record = _quality_record(quality, metric)
        if is_better(metric, quality.value(metric), best_quality):
            best, best_quality = state.adapter, quality.value(metric)
    elapsed = progress.history[-1]["elapsed_seconds"] + time.perf_counter() - start
    line = asdict(replace(result, quality=record, elapsed_seconds=elapsed))
    observer.round(line, num_rounds)
    return Progress(state, best, best_quality, (*progress.history, line))


def aligned_anew(
    bench: Bench, observer: Observer, adapter: State, server_round: int
) -> tuple[Mapping[str, Rung], Mapping[str, int]]:
    """Align the emulators anew; return them, and how many bytes of each are new, by rung."""
    new = realigned(bench, adapter, server_round)
    num_bytes = {
        name: sum(len(part) for sha256, part in package.parts.items() if sha256 not in old.parts)
        for (name, package), old in zip(new.items(), bench.packages.values(), strict=True)
    }
    bench.packages.update(new)
    told = ", ".join(f"{name} ({count:,} bytes)" for name, count in num_bytes.items())
    observer.message(f"aligned anew before round {server_round}: {told}")
    return bench.rungs(), num_bytes


def _last_loss(progress: Progress, metric: str) -> float | None:
    """Return the last known loss of the plug-in on held-out data [nat]."""
    known = (line["quality"] for line in reversed(progress.history) if line["quality"])
    quality = next(known, None)
    if quality is None:
        return None
    if metric == "perplexity":
        return math.log(quality["plug_in"])
    return float(quality["plug_in_cross_entropy"])


def _quality_record(quality: Quality, metric: str) -> dict[str, Any]:
    beside = {f"plug_in_{name}": value for name, value in quality.beside(metric).items()}
    return {"metric": metric, "plug_in": quality.value(metric), **beside}


def checkpoint_of(bench: Bench, progress: Progress, controller: Controller) -> Checkpoint:
    parts = {
        "adapter": progress.state.adapter,
        "best": progress.best,
        "moments": progress.state.moments,
        "unsaid": {
            f"{part}/{client_id}": array
            for client_id, participant in bench.participants.items()
            for part, array in participant.unsaid().items()
        },
        "parts": {
            sha256: np.frombuffer(part, np.uint8)
            for package in bench.packages.values()
            for sha256, part in package.parts.items()
            if sha256 not in bench.stored_parts
        },
    }
    return Checkpoint(
        progress.state.server_round,
        {
            f"{part}/{name}": array
            for part, arrays in parts.items()
            for name, array in arrays.items()
        },
        {
            "schema": SCHEMA,
            "best_quality": progress.best_quality,
            "last_losses": dict(progress.state.last_losses),
            "num_barren_rounds": progress.state.num_barren_rounds,
            "num_rejections": dict(progress.state.num_rejections),
            "private_steps": {c: dict(n) for c, n in progress.state.private_steps.items()},
            "history": list(progress.history),
            "controller": dict(controller.state()),
            "emulators": {n: asdict(p.manifest) for n, p in bench.packages.items()},
            "devices": {c: p.inventory() for c, p in bench.participants.items()},
            "parent_sha256": bench.loaded.sha256,
        },
    )


def resumed(bench: Bench, checkpoint: Checkpoint | None, controller: Controller) -> Progress | None:
    """Return where a checkpoint stands; None where there is no checkpoint.

    Raises:
        CheckpointError: If another version of fedpeat wrote it, or the model is another one.
    """
    if checkpoint is None:
        return None
    saved = checkpoint.state
    if (schema := saved.get("schema")) != SCHEMA:
        raise CheckpointError(
            f"cannot resume: another version of fedpeat wrote the checkpoint, its schema must be "
            f"{SCHEMA}, got {schema}; resume with that version, or start anew with --overwrite"
        )
    if saved["parent_sha256"] != bench.loaded.sha256:
        raise CheckpointError(
            "cannot resume: the model's weights are not those that the run began with"
        )
    controller.load_state(saved["controller"])

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {
            n.removeprefix(prefix): a for n, a in checkpoint.arrays.items() if n.startswith(prefix)
        }

    state = FederationState(
        checkpoint.server_round,
        part("adapter/"),
        part("moments/"),
        saved["last_losses"],
        saved["num_barren_rounds"],
        saved["num_rejections"],
        saved["private_steps"],
    )
    _restore_emulators(bench, saved["emulators"], part("parts/"))
    lasting = _lasting_parts(bench, state.adapter)
    unsaid: dict[str, dict[str, np.ndarray]] = {}
    for name, array in part("unsaid/").items():
        tuned, _, client_id = name.partition("/")
        unsaid.setdefault(client_id, {})[tuned] = array
    for client_id, inventory in saved["devices"].items():
        kept = lasting.get(inventory["kept"], {})  # of an older adapter: of no use any more
        bench.participants[client_id].restore(inventory, kept, unsaid.get(client_id))
    bench.server.load(state.adapter)
    return Progress(state, part("best/"), saved["best_quality"], tuple(saved["history"]))


def _restore_emulators(
    bench: Bench, manifests: Mapping[str, Any], parts: Mapping[str, np.ndarray]
) -> None:
    """Have again the emulators as they were last aligned; the folder has them as they were made."""
    made = {
        sha256: np.frombuffer(content, np.uint8)
        for package in bench.packages.values()
        for sha256, content in package.parts.items()
    }
    for name, manifest in manifests.items():
        wanted = [item["sha256"] for item in manifest["parts"]]
        arrays = {s: a for s, a in {**made, **parts}.items() if s in wanted}
        record = {"manifest": manifest, "config": bench.packages[name].config}
        kept = bench.packages[name].kept
        package = replace(EmulatorPackage.from_payload(Payload(arrays, record)), kept=kept)
        bench.packages[name] = package
        if lacking := bench.packages[name].lacking():
            raise CheckpointError(
                f"cannot resume: emulator {name} lacks {', '.join(lacking)}; start anew with "
                "--overwrite"
            )


def _lasting_parts(bench: Bench, adapter: State) -> dict[str, State]:
    """Return the parts of the adapter that a device on any rung may have kept, by their hash."""
    lora = LoraAggregation(bench.config.federated.lora_aggregation)
    return {
        sha256: part
        for rung in bench.rungs().values()
        for sha256, part in lora.lasting_parts(rung.own(adapter)).items()
    }
