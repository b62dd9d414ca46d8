"""Quality of the plug-in under differential privacy, beside that without.

Example:
    python benchmarks/privacy.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.config.loading import load_config, override
from fedpeat.experiments.run import run

LEVELS: dict[str, dict[str, Any]] = {
    "none": {},
    "example, epsilon 8": {"privacy": {"example_target_epsilon": 8.0}},
    "example, epsilon 3": {"privacy": {"example_target_epsilon": 3.0}},
    "client, epsilon 8": {
        "privacy": {"client_target_epsilon": 8.0},
        "federated": {"clip_norm": 0.5},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    base = load_config(Path(__file__).with_suffix(".yaml"))
    reached: dict[str, list[float]] = {level: [] for level in LEVELS}
    for seed in args.seeds:
        for level, changes in LEVELS.items():
            name = f"{level.replace(', ', '-').replace(' ', '-')}-{seed}"
            config = override(base, {**changes, "name": name, "seed": seed})
            done = Path(config.output_dir) / name / "summary.json"
            is_there = done.exists()
            summary = json.loads(done.read_text()) if is_there else run(config, overwrite=True)
            lines = (done.parent / "metrics.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])["quality"]["plug_in"]
            reached[level].append(last)
            first = json.loads(lines[0])["quality"]["plug_in"]
            print(
                f"{level}, seed {seed}: {first:.3f} -> {last:.3f}, {summary['privacy']}", flush=True
            )
    for level, values in reached.items():
        spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
        print(f"| {level} | {np.mean(values):.3f} ± {spread:.3f} |")


if __name__ == "__main__":
    main()
