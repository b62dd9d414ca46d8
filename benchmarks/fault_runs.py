"""Runs real fleets on the loopback in which things go wrong, and counts how they come through.

    python benchmarks/fault_runs.py --seeds 0 50 --folder /tmp/fault-runs [--at-once 2] [--masked]

Each seed draws what is killed, hung, cut off or wrong, and when (``tests/faults/scenario.py``). A
line of JSON per run goes into FOLDER/results.jsonl; seeds that it has already are passed over, so
that a campaign can be interrupted. At the end the table of all of them is printed. With --masked,
updates go through secure aggregation, and devices fall out of its rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from faults.fleet import Materials, config_in
from faults.runner import in_process, run_with_faults
from faults.scenario import NUM_MASKED, drawn, drawn_masked

TOLERANCE_RATIO = 0.02


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 50), metavar=("FIRST", "PAST"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=2, help="fleets side by side (2)")
    parser.add_argument("--masked", action="store_true", help="with secure aggregation")
    parser.add_argument("--again", action="store_true", help="seeds that did not go well, too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    materials = Materials(args.folder.absolute() / "materials")
    if args.one is not None:
        _run_one(materials, args.folder.absolute(), args.one, is_masked=args.masked)
        return
    if not (materials.folder / "reference").exists():
        Materials.made_in(materials.folder, NUM_MASKED if args.masked else 3)
        config = config_in(materials, materials.folder, hiding="masks" if args.masked else "")
        in_process(config, materials.folder / "reference")
    known = _results(args.folder)
    seeds = [
        seed
        for seed in range(*args.seeds)
        if seed not in known or (args.again and not known[seed]["is_well"])
    ]
    more = ["--masked"] if args.masked else []
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(partial(_in_own_process, args.folder, more), seeds))
    _print_table(args.folder)


def _in_own_process(folder: Path, more: list[str], seed: int) -> None:
    command = [sys.executable, __file__, "--folder", str(folder), "--one", str(seed), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"seed {seed}: {done.stderr[-2000:]}", flush=True)


def _run_one(materials: Materials, folder: Path, seed: int, *, is_masked: bool) -> None:
    own = folder / f"seed-{seed:03d}"
    shutil.rmtree(own, ignore_errors=True)
    outcome = run_with_faults(materials, own, drawn_masked(seed) if is_masked else drawn(seed))
    with (folder / "results.jsonl").open("a") as file:
        file.write(outcome.line() + "\n")
    if outcome.is_well:
        shutil.rmtree(own)


def _results(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the last result of each seed."""
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["seed"]: result for result in map(json.loads, lines)}


def _print_table(folder: Path) -> None:
    results = [result for _, result in sorted(_results(folder).items())]
    summary = json.loads((folder / "materials/reference/run/summary.json").read_text())
    quality = summary["quality"]
    reference, start = math.log(quality["plug_in"]), math.log(quality["full_zero_shot"])
    print("| seed | s | accepted | asked | lost | wrong | as in process | log ppl off | what |")
    print("|---|---|---|---|---|---|---|---|---|")
    offs = []
    for r in results:
        off = None if r["log_perplexity"] is None else r["log_perplexity"] / reference - 1
        offs += [] if off is None else [abs(off)]
        bad = "; ".join([*r["lost"], *r["wrong"], *r["left"], *r["faults"]])
        what = "; ".join(r["happened"]) + (f" **{bad}**" if bad else "")
        shown = "-" if off is None else f"{off:+.2%}"
        print(
            f"| {r['seed']} | {r['seconds']:.0f} | {r['num_accepted']} | {r['num_asked']} "
            f"| {len(r['lost'])} | {len(r['wrong'])} | {r['same_as_in_process']} | {shown} "
            f"| {what} |"
        )
    print(
        f"\n{len(results)} runs, {sum(r['finished'] for r in results)} finished, "
        f"{sum(bool(r['lost']) for r in results)} lost an accepted update, "
        f"{sum(bool(r['wrong']) for r in results)} accepted a wrong one, "
        f"{sum(r['same_as_in_process'] for r in results)} the same bit for bit as in process "
        f"with the same updates; {sum(o <= TOLERANCE_RATIO for o in offs)} within "
        f"{TOLERANCE_RATIO:.0%} of the log-perplexity without faults ({reference:.4f}; untuned "
        f"{start:.4f}), at most {max(offs, default=0):.2%} off; "
        f"{sum(r['is_well'] for r in results)} well"
    )


if __name__ == "__main__":
    main()
