"""What runs in the simulated cell had spent when they reached a target, side by side.

    python benchmarks/to_target.py build/benchmarks/control/wikitext-runs [--bound tuned_fixed]

The target of a seed is 95 % of the way, in log perplexity on the validation split, from the
untouched model to the best that the bound's run of that seed reached. A run that never comes there
is said to be so, and no mean is made over the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.report.intervals import estimate

COSTS = ("seconds", "joules", "bytes")
SHARE = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bound", default="tuned_fixed", help="whose runs set the target")
    args = parser.parse_args()
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for path in sorted(args.folder.glob("*-seed*/metrics.jsonl")):
        if not (path.parent / "summary.json").exists():
            continue
        method, _, seed = path.parent.name.rpartition("-seed")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if any(line["simulated"] for line in lines):
            runs.setdefault(method, {})[int(seed)] = lines
    targets = {seed: target_of(lines) for seed, lines in runs[args.bound].items()}
    print(f"| Method | Reached | {' | '.join(COSTS)} | {' | '.join(f'x {c}' for c in COSTS)} |")
    print("|:--|--:|" + "--:|" * 2 * len(COSTS))
    spent = {
        method: {s: spent_at(lines, targets[s]) for s, lines in own.items() if s in targets}
        for method, own in runs.items()
    }
    for method, own in spent.items():
        print(row(method, own, spent[args.bound]))


def target_of(lines: list[dict[str, Any]]) -> float:
    """Return the perplexity that is 95 % of the way to the best one."""
    values = [line["quality"]["plug_in"] for line in lines if line["quality"]]
    start, best = math.log(values[0]), math.log(min(values))
    return math.exp(start - SHARE * (start - best))


def spent_at(lines: list[dict[str, Any]], target: float) -> dict[str, float] | None:
    """Return the sums of costs by the first round at the target; None if there is none."""
    sums = {
        name: list(itertools.accumulate(line["simulated"].get(name, 0.0) for line in lines))
        for name in COSTS
    }
    for place, line in enumerate(lines):
        if line["quality"] and line["quality"]["plug_in"] <= target:
            return {name: values[place] for name, values in sums.items()}
    return None


def row(
    method: str,
    own: Mapping[int, Mapping[str, float] | None],
    bound: Mapping[int, Mapping[str, float] | None],
) -> str:
    """Return the means of what was spent, and geometric means of its ratio to the bound's."""
    reached = {seed: spent for seed, spent in own.items() if spent is not None}
    cells = [method, f"{len(reached)} of {len(own)}"]
    if len(reached) < len(own):
        return f"| {' | '.join(cells + ['-'] * 2 * len(COSTS))} |"
    for name in COSTS:
        known = estimate([spent[name] for spent in reached.values()])
        assert known is not None
        half = "" if known.half_width is None else f" ± {known.half_width:.3g}"
        cells.append(f"{known.mean:.4g}{half}")
    for name in COSTS:
        ratios = [
            math.log(spent[name] / against[name])
            for seed, spent in reached.items()
            if (against := bound.get(seed)) is not None
        ]
        known = estimate(ratios)
        assert known is not None
        low, high = (
            math.exp(known.mean + sign * (known.half_width or math.inf)) for sign in (-1, 1)
        )
        cells.append(f"{math.exp(known.mean):.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
