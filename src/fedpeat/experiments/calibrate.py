"""Run short federations by designed plans, to learn what a round does for the quality.

A folder of calibration has ``rounds.jsonl``, a line for each real round; ``calibration.json``, what
the federation is like; and ``quality.json``, the curves that were fitted. What is there of an
interrupted one is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fedpeat.config.loading import config_to_yaml
from fedpeat.config.schema import Config
from fedpeat.control.fixed import is_due
from fedpeat.control.quality_fit import FitError, FitSettings, RoundLog, fit_quality, save_quality
from fedpeat.core.errors import CalibrationError, CheckpointError, ConfigError
from fedpeat.core.records import ClientPlan, RoundObservation, RoundPlan, RoundResult
from fedpeat.core.run_folder import RunFolder, clean_json, storage_errors, write_atomically
from fedpeat.core.seeds import derive_seed, generator
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.observer import Observer, Silent
from fedpeat.experiments.progress import aligned_anew
from fedpeat.experiments.workload import measure_workload
from fedpeat.federated.participant import Participant
from fedpeat.federated.rounds import FederationState
from fedpeat.mec.quality import RoundWork, effective_number, recent_shares
from fedpeat.tuning.evaluation import evaluate

__all__ = ["FACTS", "Design", "calibrate", "design_of", "log_of"]

FACTS, ROUNDS = "calibration.json", "rounds.jsonl"
_SCHEMA = 1


@dataclass(frozen=True)
class Design:
    """The plan of one federation.

    Attributes:
        fraction: Share of the devices drawn in each round.
        rung_share: Share of them on each rung.
        local_steps: Steps of a device.
        server_steps: Steps of the server.
        realign_every: Rounds from one alignment to the next; 0 for none.
        is_skewed: Whether devices have their own data, as the settings say, or other data that are
            alike; what is alike by its settings stays as it is.
        pool: Share of the devices that are drawn from at all.
    """

    fraction: float
    rung_share: tuple[float, ...]
    local_steps: int
    server_steps: int
    realign_every: int
    is_skewed: bool
    pool: float


def calibrate(config: Config, *, observer: Observer | None = None) -> tuple[Path, FitError]:
    """Run the federations that are not there yet, fit the curves, and say how good they are.

    Returns:
        The folder, and the error on plans held out.

    Raises:
        CalibrationError: If the rounds are too few to fit.
        CheckpointError: If the folder is of other settings.
        ConfigError: If there is no simulated world.
    """
    observer = observer or Silent()
    folder = Path(config.output_dir) / config.name
    if config.world.preset is None:
        raise ConfigError("world.preset must be given for a calibration, got None")
    _begin(folder, config)
    bench = set_up(config, RunFolder(folder), observer, None, pools_data=False)
    facts = _facts(bench)
    write_atomically(folder / FACTS, clean_json(facts) + "\n")
    lines = _lines(folder / ROUNDS)
    benches = {True: bench, False: _alike(bench)}
    for index in range(config.calibration.num_federations):
        if any(line["federation"] == index for line in lines):
            continue
        observer.progress("federations", index, config.calibration.num_federations, "")
        design = design_of(config, index, len(bench.packages))
        lines += _federation(
            benches[design.is_skewed], design, index, observer, facts["start_loss"]
        )
        write_atomically(folder / ROUNDS, "".join(json.dumps(line) + "\n" for line in lines))
    settings = FitSettings(
        num_members=config.calibration.num_members,
        max_error=config.calibration.max_error,
        seed=config.seed,
    )
    model, error = fit_quality(log_of(lines), settings)
    save_quality(folder, model, error, settings, list(bench.packages))
    return folder, error


def design_of(config: Config, index: int, num_rungs: int) -> Design:
    """Return the plan of a federation; the plans of all are spread evenly over what there is."""
    count, control = config.calibration.num_federations, config.controller

    def spread(purpose: str) -> float:
        """Return a number in [0, 1): one in each of as many equal parts as there are plans."""
        rng = generator(config.seed, "design", purpose)
        return float((rng.permutation(count)[index] + rng.random(count)[index]) / count)

    def pick(purpose: str, choices: Sequence[int]) -> int:
        return choices[int(spread(purpose) * len(choices))]

    rng = generator(config.seed, "rungs", index)
    lone = spread("lone rung")  # half of the federations are on one rung
    shares = rng.dirichlet(np.ones(num_rungs))
    if lone < 1 / 2:
        shares = np.eye(num_rungs)[int(lone * 2 * num_rungs)]
    return Design(
        fraction=max(spread("fraction"), 0.01),
        rung_share=tuple(shares.tolist()),
        local_steps=pick("local steps", control.local_steps),
        server_steps=pick("server steps", control.server_steps),
        realign_every=pick("realign", (0, 2, 4)) if control.realigns else 0,
        is_skewed=spread("skew") < 1 / 2 or config.data.partition == "iid",
        pool=min(1.0, 2 * spread("pool")),
    )


class _Designed:
    """Plans rounds by a design.

    Args:
        design: What to do.
        rungs: Names of the rungs.
        seed: Seed of the draws.
    """

    def __init__(self, design: Design, rungs: Sequence[str], seed: int) -> None:
        self._design, self._rungs, self._seed = design, rungs, seed

    def plan(self, observation: RoundObservation) -> RoundPlan:
        rng = generator(self._seed, "cohort", observation.server_round)
        clients, design = observation.clients, self._design
        count = max(1, round(design.fraction * len(clients)))
        pool = generator(self._seed, "pool").permutation(len(clients))
        pool = pool[: max(count, round(design.pool * len(clients)))]
        drawn = sorted(rng.choice(pool, count, replace=False).tolist())
        rungs = rng.choice(len(self._rungs), count, p=design.rung_share).tolist()
        cohort = tuple(
            ClientPlan(clients[place].client_id, self._rungs[rung], design.local_steps)
            for place, rung in zip(drawn, rungs, strict=True)
        )
        realigns = is_due(design.realign_every, observation.server_round)
        return RoundPlan(cohort, design.server_steps, realigns)

    def state(self) -> Mapping[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


def _begin(folder: Path, config: Config) -> None:
    """Keep the settings; refuse a folder of others.

    Raises:
        CheckpointError: If the folder is of other settings.
    """
    path, text = folder / "config.yaml", config_to_yaml(config)
    if path.exists() and path.read_text() != text:
        raise CheckpointError(
            f"cannot go on with calibration {folder}: it was begun with other settings; "
            "give it another name, or remove it"
        )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the rounds that are there already.

    Raises:
        CheckpointError: If they are damaged.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove it to run anew") from error


def _alike(bench: Bench) -> Bench:
    """Return a bench whose devices all have data of the same kind."""
    as_many = len(bench.data.clients)
    alike = replace(bench.config.data, partition="iid", num_clients=as_many)
    config = replace(bench.config, data=alike)
    data = bench.task.read(config, bench.loaded)
    data = replace(data, server=bench.data.server, validation=bench.data.validation)
    participants = {c: Participant(c, own, bench.shelf) for c, own in data.clients.items()}
    return replace(
        bench, config=config, data=data, participants=participants, client_ids=tuple(data.clients)
    )


def _facts(bench: Bench) -> dict[str, Any]:
    """Return what the federation is like, for a simulated one to be alike."""
    examples = [part.num_examples for part in bench.data.clients.values()]
    return {
        "schema": _SCHEMA,
        "num_devices": len(examples),
        "device_examples": [min(examples), max(examples)],
        "server_examples": bench.data.server.num_examples if bench.data.server else 0,
        "start_loss": _loss(bench),
        "workload": measure_workload(bench).record(),
    }


def _federation(
    bench: Bench, design: Design, index: int, observer: Observer, start_loss: float
) -> list[dict[str, Any]]:
    """Run one federation from an untouched adapter; return a line for each round."""
    seed = derive_seed(bench.config.seed, "calibration", index)
    bench = replace(bench, config=replace(bench.config, seed=seed), packages=dict(bench.packages))
    start = bench.server.state()
    controller = _Designed(design, list(bench.packages), seed)
    federation = make_federation(bench, controller, partial(aligned_anew, bench, observer))
    state, loss, staleness = FederationState(0, start), start_loss, 0.0
    recent = np.zeros(len(bench.client_ids))
    lines = []
    try:
        for _ in range(bench.config.calibration.num_rounds):
            state, result = federation.run_round(state, loss)
            bench.server.load(state.adapter)
            after = _loss(bench)
            staleness = 0.0 if result.refresh_bytes else staleness
            recent = recent_shares(recent, _examples(bench, result))
            work = _work(bench, design, result, staleness, recent)
            lines.append(
                {
                    "federation": index,
                    "round": result.server_round,
                    "before": loss,
                    "after": after,
                    **work,
                    "design": asdict(design),
                }
            )
            loss, staleness = after, staleness + 1
    finally:
        bench.server.load(start)
    return lines


def _loss(bench: Bench) -> float:
    batch_size = bench.config.evaluation.batch_size
    return evaluate(bench.server.model, bench.data.validation, batch_size).cross_entropy


def _examples(bench: Bench, result: RoundResult) -> Float[np.ndarray, " devices"]:
    """Return the examples of each device whose update was accepted; 0 for the others."""
    accepted = {p.client_id: p.num_examples for p in result.participants if p.status == "accepted"}
    return np.array([accepted.get(name, 0) for name in bench.client_ids], dtype=np.float64)


def _work(
    bench: Bench,
    design: Design,
    result: RoundResult,
    staleness: float,
    recent: Float[np.ndarray, " devices"],
) -> dict[str, float | list[float]]:
    """Return what the accepted updates of a round were made of, as the simulated process does."""
    accepted = [p for p in result.participants if p.status == "accepted"]
    devices = [p for p in accepted if p.role == "device"]
    examples = np.array([p.num_examples for p in devices], dtype=np.float64)
    own = sum(p.weight for p in accepted if p.role == "server")
    on_rung = [[p.rung == name for name in bench.packages] for p in devices]
    total = examples.sum()
    shares = examples @ np.array(on_rung) / total if devices else np.zeros(len(bench.packages))
    return {
        "rung_share": shares.tolist(),
        "num_effective": float(effective_number(examples)),
        "local_steps": float(design.local_steps) if devices else 0.0,
        "server_share": own,
        "server_steps": float(design.server_steps) if own else 0.0,
        "staleness": staleness,
        "num_recent": float(effective_number(recent) if design.is_skewed else len(recent)),
    }


def log_of(lines: Sequence[Mapping[str, Any]]) -> RoundLog:
    """Return the rounds of a folder as a log to fit to; each federation had a plan of its own.

    Raises:
        CalibrationError: If lines are damaged.
    """
    try:
        numbers = {
            name: np.array([line[name] for line in lines], dtype=np.float64)
            for name in ("before", "after", *(item.name for item in fields(RoundWork)))
        }
        federation = np.array([int(line["federation"]) for line in lines])
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"the log of rounds is damaged: {error!r}") from error
    before, after = numbers.pop("before"), numbers.pop("after")
    return RoundLog(federation, federation, before, after, RoundWork(**numbers))
