"""What codecs of updates cost in quality and save in bytes, beside plain float32.

    python benchmarks/update_codecs.py              # run what is missing, seed by seed, then print
    python benchmarks/update_codecs.py --table      # print what is there

One emulator is made for each seed; every codec then tunes from the same start on the same batches.
Qualities are those of the last round's adapter, plugged in, on the test split.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from fedpeat.config.loading import load_config, override
from fedpeat.config.schema import Config
from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.steering import make_controller
from fedpeat.federated.in_process import Handler, InProcessTransport
from fedpeat.federated.participant import Participant
from fedpeat.federated.rounds import FederationState
from fedpeat.tuning.evaluation import evaluate

CODECS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"update_codec": "bf16"},
    "int8": {"update_codec": "int8"},
    "topk, 10 %": {"update_codec": "topk", "update_kept_ratio": 0.1},
    "topk, 1 %": {"update_codec": "topk", "update_kept_ratio": 0.01},
    "topk, 1 %, no feedback": {"update_codec": "topk", "update_kept_ratio": 0.01},
}
RESULTS = Path("build/benchmarks/update_codecs/results.json")


def forgetful(participant: Participant) -> Handler:
    """Return what a device does that adds nothing of what it left out to its next update."""

    def handle(kind: str, content: bytes) -> bytes:
        answer = participant.handle(kind, content)
        participant._encoder.residuals.clear()  # noqa: SLF001 - no setting switches it off
        return answer

    return handle


def measure(bench: Bench, name: str) -> dict[str, float]:
    """Run all rounds with one codec; return quality, and what the devices sent."""
    config = override(bench.config, {"federated": CODECS[name]})
    participants = {c: Participant(c, d, bench.shelf) for c, d in bench.data.clients.items()}
    bench = replace(bench, config=config, participants=participants)
    forgets = name.endswith("no feedback")
    handlers = {c: forgetful(p) if forgets else p.handle for c, p in participants.items()}
    loop = make_federation(bench, make_controller(bench), transport=InProcessTransport(handlers))
    state, sent = FederationState(0, bench.server.state()), []
    for _ in range(config.federated.num_rounds):
        state, result = loop.run_round(state, None)
        assert {p.status for p in result.participants} == {"accepted"}, result
        sent.append([result.bytes_up, result.bytes_up_plain])
    bench.server.load(state.adapter)
    quality = evaluate(bench.server.model, bench.data.test, config.evaluation.batch_size)
    up, plain = np.sum(sent, axis=0)
    return {
        "perplexity": quality.value("perplexity"),
        "zero_shot": bench.zero_shot.value("perplexity"),
        "bytes_up": int(up),
        "bytes_up_plain": int(plain),
    }


def run_seed(config: Config, seed: int, results: dict[str, dict[str, Any]]) -> None:
    """Run the codecs of a seed that are missing."""
    missing = [name for name in CODECS if name not in results.get(str(seed), {})]
    if not missing:
        return
    folder = RunFolder(Path(config.output_dir) / f"seed-{seed}")
    folder.create()
    bench = set_up(replace(config, seed=seed), folder, Silent(), None, pools_data=False)
    start = bench.server.state()
    for name in missing:
        bench.server.load(start)
        results.setdefault(str(seed), {})[name] = measure(bench, name)
        print(seed, name, results[str(seed)][name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1))
    folder.close()


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print each codec's mean over the seeds beside float32."""
    print("| codec | perplexity of the plug-in | beside float32, by seed | bytes up | of plain |")
    print("|---|--:|---|--:|--:|")
    for name in CODECS:
        rows = [seed[name] for seed in results.values() if name in seed]
        plain = [seed["float32"] for seed in results.values() if name in seed]
        pairs = zip(rows, plain, strict=True)
        apart = ", ".join(f"{r['perplexity'] - p['perplexity']:+.3f}" for r, p in pairs)
        perplexity = np.mean([row["perplexity"] for row in rows])
        up = np.mean([row["bytes_up"] for row in rows])
        share = up / np.mean([row["bytes_up_plain"] for row in rows])
        print(f"| {name} | {perplexity:.3f} | {apart} | {up:,.0f} | {share:.1%} |")


def main() -> None:
    """Run what is missing, or print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.table:
        config = load_config(Path(__file__).with_name("update_codecs.yaml"))
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            run_seed(config, seed, results)
    print_table(results)


if __name__ == "__main__":
    main()
