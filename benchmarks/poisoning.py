"""What poisoned updates do to the plug-in, and how much of that each defence prevents.

    python benchmarks/poisoning.py                  # run what is missing, seed by seed, then print
    python benchmarks/poisoning.py --table          # print what is there

One emulator is made for each seed; every cell then tunes from the same start with the same batches.
Qualities are those of the last round's adapter, plugged in, on the test split: choosing the best
round by its validation quality, as a run does, is a defence of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from attackers import UPDATE_ATTACKS, Backdoor, HostileTransport, eager, hostile_devices, no_attack
from fedpeat.adapter.lora import State, lora_pairs
from fedpeat.config.loading import load_config, override
from fedpeat.config.schema import Config
from fedpeat.core.errors import AggregationError
from fedpeat.core.run_folder import RunFolder
from fedpeat.data.packing import PackedText
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.steering import make_controller
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.participant import Participant
from fedpeat.federated.rounds import FederationState
from fedpeat.tuning.evaluation import evaluate, evaluating

DEFENCES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean, clipped to the median norm": {"clip_to_median": True},
    "median": {"robust_rule": "median"},
    "trimmed_mean": {"robust_rule": "trimmed_mean"},
    "multi_krum": {"robust_rule": "multi_krum"},
}
ASSUMED = {"assumed_attackers_ratio": 0.3}
TRIGGER, CONTINUATION = "\n# checked by quality control\n", "eval("
POISONED_BLOCKS, MORE_STEPS = 1.0, 5


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    seed: int
    attack: str
    ratio: float
    defence: str


def cells(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells at 20 %, seed by seed, then those of the other shares."""
    for seed in seeds:
        for attack in ("none", *UPDATE_ATTACKS):
            for defence in DEFENCES:
                yield Cell(seed, attack, 0.2 if attack != "none" else 0.0, defence)
    for seed in seeds:
        for ratio in (0.3, 0.1):
            for attack in UPDATE_ATTACKS:
                for defence in DEFENCES:
                    yield Cell(seed, attack, ratio, defence)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("benchmarks/poisoning.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    config = load_config(args.config)
    results = Path(config.output_dir) / "results.jsonl"
    done = _read(results)
    if not args.table:
        _run_missing(config, cells(args.seeds), done, results)
    print_tables(list(done.values()))


def _read(path: Path) -> dict[Cell, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = Cell.__dataclass_fields__
    return {Cell(**{name: line[name] for name in names}): line for line in lines}


def _run_missing(
    config: Config, wanted: Iterator[Cell], done: dict[Cell, dict[str, Any]], path: Path
) -> None:
    bench, start = None, {}
    for cell in wanted:
        if cell in done:
            continue
        if bench is None or bench.config.seed != cell.seed:
            folder = RunFolder(Path(config.output_dir) / f"seed-{cell.seed}")
            folder.create()
            own = replace(config, seed=cell.seed)
            bench = set_up(own, folder, Silent(), None, pools_data=False)
            folder.close()
            start = {name: array.copy() for name, array in bench.server.state().items()}
        begin = time.perf_counter()
        bench.server.load(start)
        line = {**asdict(cell), **run_cell(bench, cell), "seconds": time.perf_counter() - begin}
        done[cell] = line
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Tune from the start under one attack and one defence, and say what came of it."""
    changes = {**DEFENCES[cell.defence], **ASSUMED}
    config = override(bench.config, {"federated": changes})
    backdoor = Backdoor(_tokens(bench, TRIGGER), _tokens(bench, CONTINUATION))
    hostile = hostile_devices(bench.data.clients, cell.ratio, cell.seed)
    poisoners = hostile if cell.attack == "backdoor" else []
    participants = {}
    for name, text in bench.data.clients.items():
        assert isinstance(text, PackedText)
        is_poisoner = name in poisoners
        own = backdoor.poisoned(text, POISONED_BLOCKS, cell.seed) if is_poisoner else text
        participants[name] = Participant(name, own, bench.shelf)
    bench = replace(bench, config=config, participants=participants)
    handlers = {
        name: eager(p.handle, MORE_STEPS) if name in poisoners else p.handle
        for name, p in participants.items()
    }
    inner = InProcessTransport(handlers)
    attack = UPDATE_ATTACKS.get(cell.attack, no_attack)
    transport = HostileTransport(inner, hostile, attack, cell.seed)
    federation = make_federation(bench, make_controller(bench), transport=transport)
    state = FederationState(0, bench.server.state())
    with suppress(AggregationError):  # a run that gives up ends with the adapter that it had
        for _ in range(config.federated.num_rounds):
            state, _ = federation.run_round(state, None)
    bench.server.load(state.adapter)
    assert isinstance(bench.data.test, PackedText)
    test = evaluate(bench.server.model, bench.data.test, 16)
    return {
        "zero_shot": bench.zero_shot.perplexity,
        "plug_in": test.perplexity,
        "attack_success": success(bench, backdoor, bench.data.test.spread(100)),
        "num_rounds": state.server_round,
        "outside": outside(state.adapter, transport.honest),
    }


def _tokens(bench: Bench, text: str) -> tuple[int, ...]:
    return tuple(bench.loaded.processor(text, add_special_tokens=False)["input_ids"])


def success(bench: Bench, backdoor: Backdoor, test: PackedText) -> float:
    """Return the share of test blocks in which the model continues the trigger as was chosen."""
    model, data = bench.server.model, backdoor.triggered(test)
    length, hits = len(backdoor.continuation), 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, data.num_examples, 16):
            ids = torch.from_numpy(data.input_ids[start : start + 16].astype(np.int64))
            best = model(input_ids=ids, use_cache=False).logits[:, -length - 1 : -1].argmax(-1)
            hits += int((best == ids[:, -length:]).all(1).sum())
    return hits / data.num_examples


def outside(adapter: State, honest: Sequence[State]) -> float:
    """Return the share of the products' entries that no honest device's lie on both sides of."""
    num_outside = num_entries = 0
    for name_a, name_b in lora_pairs(adapter):
        own = [{**adapter, **state} for state in honest]  # with what the round froze
        products = np.stack([s[name_b].astype(np.float64) @ s[name_a] for s in own])
        product = adapter[name_b].astype(np.float64) @ adapter[name_a]
        room = 1e-6 * np.abs(products).max()
        beyond = (product < products.min(0) - room) | (product > products.max(0) + room)
        num_outside += int(beyond.sum())
        num_entries += product.size
    return num_outside / max(1, num_entries)


def print_tables(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print what each attack does to the plug-in, against a plain mean of honest devices."""
    plain = {x["seed"]: x for x in lines if (x["attack"], x["defence"]) == ("none", "mean")}
    for seed, line in plain.items():
        print(f"Seed {seed}: zero-shot {line['zero_shot']:.2f}, plug-in {line['plug_in']:.2f}")
    for ratio in sorted({line["ratio"] for line in lines} - {0.0}):
        at = [line for line in lines if line["ratio"] == ratio]
        seeds = {line["seed"] for line in at}
        none = [line for line in lines if line["ratio"] == 0 and line["seed"] in seeds]
        print(f"\n{ratio:.0%} hostile, {len(seeds)} seed(s)\n")
        print(f"| defence | none | {' | '.join(UPDATE_ATTACKS)} | backdoor succeeds |")
        print("|:--" + "|--:" * (len(UPDATE_ATTACKS) + 2) + "|")
        for defence in DEFENCES:
            print(f"| {defence} | {' | '.join(_row(defence, [*none, *at], plain))} |")
    print("\nEntries of BA outside of those of the honest devices, last round, 20 % hostile\n")
    print(f"| defence | {' | '.join(UPDATE_ATTACKS)} |")
    print("|:--" + "|--:" * len(UPDATE_ATTACKS) + "|")
    for defence in DEFENCES:
        own = [x for x in lines if x["defence"] == defence and x["ratio"] == 0.2]
        shares = [[100 * x["outside"] for x in own if x["attack"] == a] for a in UPDATE_ATTACKS]
        print(f"| {defence} | {' | '.join(_text(values, '{:.1f} %') for values in shares)} |")


def _row(
    defence: str, lines: Sequence[Mapping[str, Any]], plain: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    row = []
    for attack in ("none", *UPDATE_ATTACKS):
        own = [x for x in lines if x["defence"] == defence and x["attack"] == attack]
        differences = [x["plug_in"] - plain[x["seed"]]["plug_in"] for x in own]
        row.append(_text(differences, "{:+.2f}"))
    own = [x for x in lines if x["defence"] == defence and x["attack"] == "backdoor"]
    return [*row, _text([100 * x["attack_success"] for x in own], "{:.0f} %")]


def _text(values: Sequence[float], form: str) -> str:
    """Return the mean of some values, and the least and largest if there are several."""
    if not values:
        return "-"
    least, mean, most = (form.format(float(f(values))) for f in (np.min, np.mean, np.max))
    return mean if least == most else f"{mean} ({least} to {most})"


if __name__ == "__main__":
    main()
