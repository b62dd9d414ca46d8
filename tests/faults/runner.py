"""One run with faults: what happened, and whether the run came through it as it should."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from faults.fleet import NUM_ROUNDS, Fleet, Materials
from faults.scenario import PHASES, Event, Scenario
from fedpeat.config.loading import override
from fedpeat.core.wire import decode
from fedpeat.experiments import bench
from fedpeat.experiments.run import run
from fedpeat.federated.in_process import Handler, InProcessTransport

__all__ = ["Outcome", "in_process", "run_with_faults"]

LIMIT_SECONDS = 900.0
_LOOK_SECONDS = 0.25
_PATIENCE_SECONDS = 15.0  # for a program that is to be killed, before another one is
_LAST_PATIENCE_SECONDS = 0.5  # the same, where the run is soon over
_TIMES = {"seconds", "elapsed_seconds", "peak_rss_bytes"}


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        seed: Its seed.
        finished: Whether the server ended by itself, and well.
        seconds: How long it took.
        happened: What went wrong, and when.
        num_accepted: Updates of devices that count.
        lost: Rounds and devices whose accepted update is not in the end what it was.
        wrong: Wrong updates that were accepted.
        left: Processes and listeners that stayed behind.
        faults: Other things that must not be.
        log_perplexity: Of the plug-in, on the test split.
        same_as_in_process: Whether a run in process with the same updates has the same adapter.
    """

    seed: int
    finished: bool = False
    seconds: float = 0.0
    happened: list[str] = field(default_factory=list)
    num_accepted: int = 0
    num_asked: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    log_perplexity: float | None = None
    same_as_in_process: bool = False

    @property
    def is_well(self) -> bool:
        bad = [*self.lost, *self.wrong, *self.left, *self.faults]
        return self.finished and not bad and self.same_as_in_process

    def line(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps({**asdict(self), "is_well": self.is_well})


class _Chronicle:
    """What metrics and checkpoints have said of rounds while the run went on."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[str, Any]] = {}
        self.changed: list[str] = []

    def note(self, history: list[dict[str, Any]]) -> None:
        """Compare with what was said before."""
        for line in history:
            before = self._lines.setdefault(line["server_round"], line)
            if before != line:
                self.changed.append(f"round {line['server_round']} was rewritten")

    def compare(self, final: list[dict[str, Any]]) -> None:
        """Compare with the end, in which nothing may lack."""
        self.note(final)
        kept = {line["server_round"] for line in final}
        self.changed += [f"round {r} is gone" for r in self._lines if r not in kept]


def run_with_faults(
    materials: Materials, folder: Path, scenario: Scenario, num_rounds: int = NUM_ROUNDS
) -> Outcome:
    """Run a fleet while things go wrong, and judge what comes of it."""
    joiners = scenario.late_joiners
    num_waited_for = len(scenario.names) - len(joiners)
    names, hiding = list(scenario.names), scenario.hiding
    fleet = Fleet(materials, folder, names, num_waited_for, num_rounds, hiding)
    outcome, chronicle, start = Outcome(scenario.seed), _Chronicle(), time.monotonic()
    try:
        fleet.server.start()
        for name in scenario.names:
            if name not in joiners:
                fleet.join(name, scenario.oddities.get(name, ""))
        _see_through(fleet, scenario, outcome, chronicle, start)
    except AssertionError as error:
        outcome.faults.append(str(error))
    finally:
        outcome.seconds = round(time.monotonic() - start, 1)
        outcome.left = fleet.end()
    final = fleet.history()
    chronicle.compare(final)
    outcome.lost = sorted(set(chronicle.changed))
    _judge(outcome, fleet, final)
    return outcome


def _see_through(
    fleet: Fleet, scenario: Scenario, outcome: Outcome, chronicle: _Chronicle, start: float
) -> None:
    waiting = list(scenario.events)
    reached: dict[str, float] = {}
    later: list[tuple[float, Callable[[], None]]] = []
    while (now := time.monotonic() - start) < LIMIT_SECONDS:
        fleet.look()
        history = fleet.history()
        chronicle.note(history)
        _note_phases(reached, fleet, len(history) - 1, now)
        for at, end in [item for item in later if item[0] <= now]:
            later.remove((at, end))
            end()
        for event in list(waiting):
            due = reached.get(event.phase, math.inf) + event.delay_seconds
            if due <= now and _happen(fleet, event, scenario, now - due, later, now):
                waiting.remove(event)
                words = [event.kind, event.who, event.role, f"({event.seconds:.0f} s)"]
                told = " ".join(word for word in words if word)
                outcome.happened.append(f"{now:.0f} s, {max(len(history) - 1, 0)} rounds: {told}")
        if fleet.server.ended == 0:
            outcome.finished = True
            kills = [event for event in waiting if event.kind == "kill"]
            outcome.faults += [f"ended before {e.role} of {e.who} was killed" for e in kills]
            return
        time.sleep(_LOOK_SECONDS)
    outcome.faults.append(f"did not end in {LIMIT_SECONDS:g} s")


def _note_phases(reached: dict[str, float], fleet: Fleet, num_rounds: int, now: float) -> None:
    """Note when each phase begins."""
    there = {
        "start": True,
        "run": (fleet.run_folder / "log.txt").exists(),
        "welcome": any("welcomed" in _text(device.log) for device in fleet.devices.values()),
        "round 1": num_rounds >= 1,
        "round 2": num_rounds >= 2,
    }
    for phase in PHASES:
        if there[phase]:
            reached.setdefault(phase, now)


def _happen(
    fleet: Fleet,
    event: Event,
    scenario: Scenario,
    late_seconds: float,
    later: list[tuple[float, Callable[[], None]]],
    now: float,
) -> bool:
    """Let something happen; return whether that could be."""
    if event.kind == "kill":
        victim = fleet.server if event.who == "server" else fleet.devices[event.who]
        if victim.ended is not None:
            return False  # it is killed, and not yet started again
        if fleet.kill(victim, event.role, event.seconds):
            return True
        patience = _LAST_PATIENCE_SECONDS if event.phase == PHASES[-1] else _PATIENCE_SECONDS
        return late_seconds > patience and fleet.kill(victim, "itself", event.seconds)
    if event.kind == "cut":
        fleet.network.cut()
        later.append((now + event.seconds, fleet.network.mend))
    elif event.kind == "hang":
        fleet.hang(event.who, stopped=True)
        later.append((now + event.seconds, lambda: fleet.hang(event.who, stopped=False)))
    elif event.kind == "join":
        fleet.join(event.who, scenario.oddities.get(event.who, ""))
    else:
        fleet.make_room(event.who)
    return True


def _judge(outcome: Outcome, fleet: Fleet, final: list[dict[str, Any]]) -> None:
    rounds = [line["server_round"] for line in final]
    if rounds != list(range(fleet.config.federated.num_rounds + 1)):
        outcome.faults.append(f"rounds are {rounds}")
        outcome.finished = False
        return
    devices = [(line["server_round"], p) for line in final for p in line["participants"]]
    devices = [(server_round, p) for server_round, p in devices if p["role"] == "device"]
    accepted = {(r, p["client_id"]) for r, p in devices if p["status"] == "accepted"}
    outcome.num_asked, outcome.num_accepted = len(devices), len(accepted)
    names = [(r, p["client_id"]) for r, p in devices]
    if len(names) != len(set(names)):
        outcome.lost.append("a device counts twice in a round")
    for name in fleet.devices:
        outcome.wrong += [
            f"{sent['kind']} of {name} in round {sent['server_round']}"
            for sent in _told(fleet.folder / f"{name}.told")
            if (sent["server_round"], name) in accepted
        ]
        if _num_downloads(fleet.devices[name].log) > 1:
            outcome.faults.append(f"{name} downloaded its emulator again")
    if not outcome.finished:
        return
    summary = json.loads((fleet.run_folder / "summary.json").read_text())
    outcome.log_perplexity = math.log(summary["quality"]["plug_in"])
    replay = in_process(fleet.config, fleet.folder / "replayed", accepted)
    outcome.same_as_in_process = _adapter(fleet.run_folder) == _adapter(replay)


def _told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _num_downloads(log: Path) -> int:
    lines = _text(log).splitlines()
    return sum("holds emulator" in line and "(0 bytes came)" not in line for line in lines)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


class _Replaying(InProcessTransport):
    """Loses the updates that the run did not take."""

    accepted: set[tuple[int, str]] | None = None

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        super().__init__({n: self._only_taken(n, h) for n, h in handlers.items()})

    def _only_taken(self, name: str, handler: Handler) -> Handler:
        def answer(kind: str, content: bytes) -> bytes:
            if kind == "train" and self.accepted is not None:
                server_round = decode(content).record["server_round"]
                if (server_round, name) not in self.accepted:
                    raise ConnectionError("not taken")
            return handler(kind, content)

        return answer


def in_process(config: Any, folder: Path, accepted: set[tuple[int, str]] | None = None) -> Path:
    """Run the same settings in this process, with the updates that were accepted and no others.

    Noise, if there is any, comes from the seed.

    Args:
        config: Settings of the run.
        folder: Where the run folder goes.
        accepted: Rounds and devices; None for all.

    Returns:
        The run folder.
    """
    _Replaying.accepted = accepted
    changes = {"output_dir": str(folder), "name": "run", "privacy": {"noise": "seed"}}
    with mock.patch.object(bench, "InProcessTransport", _Replaying):
        run(override(config, changes), overwrite=True)
    return folder / "run"
