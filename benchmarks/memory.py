"""Memory of simulated devices: how much one more of them costs.

All devices of a rung share one frozen emulator, so a device should cost no more than what is its
own: its adapter, its optimiser state and its text. Each number of devices is run in a process of
its own.

    python benchmarks/memory.py [--model NAME] [--devices 2 8 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from fedpeat.config.loading import config_from_dict
from fedpeat.core.run_folder import RunFolder
from fedpeat.data.examples import FederatedData
from fedpeat.data.packing import PackedText
from fedpeat.experiments.bench import make_federation, set_up
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.steering import make_controller
from fedpeat.federated.rounds import FederationState, peak_rss_bytes

NUM_ROUNDS = 2
BLOCK_SIZE = 64
BLOCKS_PER_DEVICE = 64


def main() -> None:
    """Measure each number of devices and print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="bundled", help="model to tune (default: %(default)s)")
    parser.add_argument("--r", type=int, default=8, help="rank of LoRA (default: %(default)s)")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 8, 64], metavar="N")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.model, args.r, args.one)))
        return
    figures = [in_own_process(args.model, args.r, n) for n in sorted(set(args.devices))]
    print(json.dumps(figures) if args.json else table(figures))


def in_own_process(model: str, r: int, num_devices: int) -> dict[str, Any]:
    """Measure one number of devices in a fresh process, whose peak memory is then its own."""
    command = [sys.executable, __file__, "--model", model, "--r", str(r), "--one", str(num_devices)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure(model: str, r: int, num_devices: int) -> dict[str, Any]:
    """Run two rounds and return what they took [byte]."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    def text(num_blocks: int, seed: int) -> PackedText:
        ids = (
            np.random.default_rng(seed).integers(0, 256, (num_blocks, BLOCK_SIZE)).astype(np.int32)
        )
        return PackedText(ids, np.ones_like(ids, dtype=bool), np.ones_like(ids))

    with tempfile.TemporaryDirectory() as folder:
        config = config_from_dict(
            {
                "model": {"name": model, "device": "cpu"},
                "data": {"block_size": BLOCK_SIZE},
                "adapter": {"r": r},
                "local": {"local_steps": 1, "local_batch_size": 4},
            }
        )
        own = {f"device-{i:04d}": text(BLOCKS_PER_DEVICE, i) for i in range(num_devices)}
        held_out = text(8, num_devices)
        federated = FederatedData(own, held_out, held_out, held_out)
        bench = set_up(config, RunFolder(Path(folder)), Silent(), federated, pools_data=False)
        before = peak_rss_bytes()
        federation = make_federation(bench, make_controller(bench))
        state = FederationState(0, bench.server.state())
        for _ in range(NUM_ROUNDS):
            state, _ = federation.run_round(state, None)
        adapter = sum(array.nbytes for array in state.adapter.values())
        one = next(iter(own.values()))
        frozen = [
            p
            for p in bench.shelf.get(bench.package.manifest.sha256).model.parameters()  # type: ignore[union-attr]
            if not p.requires_grad
        ]
        return {
            "num_devices": num_devices,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_rss_bytes_after_set_up": before,
            "adapter_bytes": adapter,
            "optimizer_bytes": 2 * adapter,  # AdamW's two moments
            "data_bytes": one.input_ids.nbytes + one.loss_mask.nbytes + one.token_bytes.nbytes,
            "frozen_emulator_bytes": sum(p.nbytes for p in frozen),
            "num_frozen_storages": len({p.untyped_storage().data_ptr() for p in frozen}),
        }


def table(figures: list[dict[str, Any]]) -> str:
    """Return the figures as text."""
    first = figures[0]
    own = first["adapter_bytes"] + first["optimizer_bytes"] + first["data_bytes"]
    lines = [
        f"adapter {mib(first['adapter_bytes'])}, optimiser {mib(first['optimizer_bytes'])}, "
        f"text {mib(first['data_bytes'])}: {mib(own)} are a device's own; "
        f"frozen emulator {mib(first['frozen_emulator_bytes'])}",
        "",
        "| devices | peak memory | growth per device | growth / a device's own |",
        "|---:|---:|---:|---:|",
    ]
    for line in figures:
        more = line["num_devices"] - first["num_devices"]
        growth = (line["peak_rss_bytes"] - first["peak_rss_bytes"]) / more if more else None
        lines.append(
            f"| {line['num_devices']} | {mib(line['peak_rss_bytes'])} "
            f"| {mib(growth) if growth is not None else '-'} "
            f"| {f'{growth / own:.2f}' if growth is not None else '-'} |"
        )
    return "\n".join(lines)


def mib(num_bytes: float) -> str:
    """Return bytes as MiB."""
    return f"{num_bytes / 2**20:,.2f} MiB"


if __name__ == "__main__":
    main()
