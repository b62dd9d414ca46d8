"""Memory while an emulator is made: how much beside the full model, in units of what is kept.

A random Llama of --megabytes is written to disk, loaded in a process of its own, and made into an
emulator, which is packed and saved as a run does it. The process samples its own memory.

    python benchmarks/building.py [--megabytes 400] [--recipes greedy:0.5 greedy:0.5+int8 ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import transformers

from fedpeat.config.loading import config_from_dict
from fedpeat.data.examples import FederatedData
from fedpeat.data.packing import PackedText
from fedpeat.experiments.emulators import make_emulators
from fedpeat.experiments.observer import Silent
from fedpeat.model.blocks import find_blocks
from fedpeat.model.loading import load_model
from fedpeat.tuning.evaluation import evaluate

VOCAB, BLOCK_SIZE, NUM_LAYERS = 1024, 64, 12
RECIPES = ["layer_drop:0.5", "greedy:0.5+distill:4096", "width:0.5", "int8", "int4"]


def main() -> None:
    """Measure each recipe in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=400, help="size of the full model")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "RECIPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), args.one[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.megabytes)
        print("| recipe | full model | emulator | peak beside the model | of the emulator |")
        print("|:--|--:|--:|--:|--:|")
        for recipe in args.recipes:
            command = [sys.executable, __file__, "--one", folder, recipe]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            ratio = found["beside"] / found["emulator"]
            sizes = (f"{found[key] / 1e6:.0f} MB" for key in ("full", "emulator", "beside"))
            print(f"| {recipe} | {' | '.join(sizes)} | x{ratio:.2f} |", flush=True)


def write_model(folder: Path, megabytes: int) -> None:
    """Write a random Llama of about this size in float32, in the Hub's form."""
    hidden = int((megabytes * 1e6 / 4 / NUM_LAYERS / 12) ** 0.5) // 64 * 64
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=hidden // 64,
        max_position_embeddings=BLOCK_SIZE,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def measure(model: Path, recipe: str) -> dict[str, int]:
    """Make an emulator, and return bytes: of the models, and of memory before and at most."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    config = config_from_dict(
        {
            "data": {"block_size": BLOCK_SIZE},
            "emulator": {
                "recipe": recipe,
                "distill_batch_size": 1,
                "calibration_tokens": BLOCK_SIZE,
            },
        }
    )
    loaded = load_model(str(model), load_processor=lambda *_, **__: None, device="cpu")
    data = FederatedData({"device": text(1)}, text(16), text(2), text(2))
    evaluate(loaded.model, data.test, 1)  # so that what the first call brings is not counted
    blocks = find_blocks(loaded.model)
    tuned = [0, 1, blocks.num_blocks - 2, blocks.num_blocks - 1]
    with tempfile.TemporaryDirectory() as folder, Samples() as samples:
        before = resident_bytes()
        packages = make_emulators(
            loaded, blocks, tuned, config.emulator, data, "perplexity", seed=0, observer=Silent()
        )
        (package,) = packages.values()
        package.save(Path(folder) / "emulator")
    return {
        "full": sum(p.nbytes for p in loaded.model.parameters()),
        "emulator": package.manifest.num_bytes,
        "beside": samples.most - before,
    }


def text(num_blocks: int) -> PackedText:
    """Return random text."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (num_blocks, BLOCK_SIZE)).astype(np.int32)
    return PackedText(ids, np.ones_like(ids, dtype=bool), np.ones_like(ids))


class Samples:
    """The most memory that the process had for a while, looked at every 5 ms."""

    def __init__(self) -> None:
        self.most = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Samples:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ends.wait(0.005):
            self.most = max(self.most, resident_bytes())


def resident_bytes() -> int:
    """Return the memory that the process has now."""
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
