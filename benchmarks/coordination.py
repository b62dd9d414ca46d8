"""What a round costs beside the tuning: seconds, and memory of every program.

Four ways in one run of this script, one after the other: devices in this process; devices of their
own that `fedpeat serve` and `fedpeat join` run, whose worker stays warm; plain Flower, whose
ClientApp imports torch; and the last two with an emulator of GPT-2 small's shape, where the plain
ClientApp loads transformers, PEFT and the emulator for each message.

    python benchmarks/coordination.py [--rounds 4] [--parts process process-cpu warm plain ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import transformers
import yaml

from coordination_apps import COLD_WORK, plain_flower, started, write_app
from fedpeat.control.fixed import FixedController
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.experiments.fleet_folder import free_port
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.rounds import Federation, FederationState
from fedpeat.federated.screening import Limits
from fedpeat.federated.shelf import Rung
from fedpeat.tuning.local import LocalSettings

ASSETS = Path(__file__).parent.parent / "src" / "fedpeat" / "assets" / "base_model"
BLOCK_SIZE = 64
TIME_OUT_SECONDS = 900.0
Found = tuple[list[float], dict[str, float]]
"""Seconds of each round, and the most memory that each program had [MB]."""


def main() -> None:
    """Measure each way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=4, help="on fleets; 100 in this process")
    parser.add_argument("--devices", type=int, default=2, help="of our own fleet (plain: 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| way | round, median (least to most) | memory of each program |")
    print("|:--|--:|:--|")
    for name in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            title, measure = PARTS[name]
            seconds, memory = measure(Path(folder), args.rounds, args.devices)
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        unit, factor = ("ms", 1e3) if most < 1 else ("s", 1.0)
        spread = f"{middle * factor:.1f} {unit} ({least * factor:.1f} to {most * factor:.1f})"
        programs = ", ".join(f"{n} {mb:.0f}" for n, mb in sorted(memory.items()))
        print(f"| {title} | {spread} | {programs} |", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


# --- devices in this process --------------------------------------------------------------------


def adapter() -> dict[str, np.ndarray]:
    """Return LoRA of rank 8 on GPT-2 small's attention: 24 tensors, 1.2 MB."""
    generator = np.random.default_rng(0)
    shapes = {"lora_A.weight": (8, 768), "lora_B.weight": (2304, 8)}
    return {
        f"transformer.h.{i}.attn.c_attn.{name}": generator.normal(size=shape).astype(np.float32)
        for i in range(12)
        for name, shape in shapes.items()
    }


def in_process(_: Path, __: int, ___: int, clock: Callable[[], float] = time.perf_counter) -> Found:
    """Let four devices return what they get."""
    rung = Rung("e" * 64, {}, {})
    federation = Federation(
        transport=InProcessTransport({f"device-{i}": returned for i in range(4)}),
        controller=FixedController(
            rung="top", fraction_train=1.0, local_steps=1, server_steps=0, seed=0
        ),
        rungs={"top": rung},
        lora=LoraAggregation(),
        optimizer=ServerOptimizer(),
        limits=Limits(10**6, None),
        settings=LocalSettings(1, 1e-3, 0, 0.0, 0.0, 0.0),
        server_training=None,
        server_weight_ratio=None,
        min_clients=1,
        deadline_seconds=None,
        num_rounds=1000,
        seed=0,
    )
    state, seconds = FederationState(0, adapter()), []
    for _round in range(100):
        start = clock()
        state, result = federation.run_round(state, None)
        seconds.append(clock() - start)
        assert not result.warnings, result.warnings
    return seconds, {"all": psutil.Process().memory_info().rss / 1e6}


def returned(kind: str, content: bytes) -> bytes:
    """Answer as a device does that changes nothing."""
    if kind == "hello":
        held = {"held": ["e" * 64], "emulator_parts": []}
        return encode(Payload(record={"num_examples": 1, **held}))
    task = decode(content)
    record = {key: task.record[key] for key in ("server_round", "emulator")}
    losses = dict.fromkeys(("first_loss", "last_loss", "mean_loss"), 1.0)
    answer = {**record, **losses, "num_examples": 1, "num_tokens": 1, "seconds": "00000.000000"}
    return encode(Payload(task.arrays, answer))


# --- our own fleet ------------------------------------------------------------------------------


def warm(folder: Path, num_rounds: int, num_devices: int) -> Found:
    """Run the bundled model with an adapter of 1 MB, one step of one block a round."""
    adapter = {"r": 14, "lora_alpha": 14, "placement": "all"}
    return own_fleet(folder, num_rounds, num_devices, "bundled", adapter)


def warm_gpt2(folder: Path, num_rounds: int, _: int) -> Found:
    """Run a random network of GPT-2 small's shape, all of whose blocks the emulator keeps."""
    write_gpt2(folder / "gpt2")
    adapter = {"r": 8, "placement": "all", "target_modules": ["c_attn"]}
    return own_fleet(folder, num_rounds, 2, str(folder / "gpt2"), adapter)


def own_fleet(
    folder: Path, num_rounds: int, num_devices: int, model: str, adapter: Mapping[str, Any]
) -> Found:
    """Start a server and devices; return what each round but the first took."""
    names = [f"device-{i}" for i in range(num_devices)]
    settings = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "num_threads": 1,
        "model": {"name": model},
        "data": {
            "num_clients": num_devices,
            "partition": "iid",
            "block_size": BLOCK_SIZE,
            "max_tokens_per_client": 64 * BLOCK_SIZE,
            "max_eval_blocks": 1,
        },
        "emulator": {"recipe": "full"},
        "adapter": adapter,
        "local": {"local_steps": 1, "local_batch_size": 1},
        "server": {"participates": False},
        "federated": {"num_rounds": num_rounds + 1, "round_deadline_seconds": 300},
        "evaluation": {"every": 1000, "full_tuned": False},
        "fleet": {"port": free_port(), "keys": str(folder / "keys" / "server")},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    fedpeat = str(Path(sys.executable).parent / "fedpeat")
    subprocess.run(
        [fedpeat, "keys", folder / "keys", "--devices", *names], check=True, capture_output=True
    )
    shards = [fedpeat, "shards", str(config), str(folder / "shards")]
    subprocess.run(shards, check=True, capture_output=True)
    texts = sorted((folder / "shards").iterdir())
    log, programs = folder / "log.txt", {}
    programs["serve"] = started([fedpeat, "serve", str(config)], os.environ, log)
    for name, text in zip(names, texts, strict=True):
        command = [fedpeat, "join", "--server", f"localhost:{settings['fleet']['port']}"]  # type: ignore[index]
        command += ["--keys", str(folder / "keys" / "devices" / name), "--data", str(text)]
        programs[name] = started([*command, "--num-threads", "1"], os.environ, log)
    with Memory(programs.values()) as memory:
        try:
            if programs["serve"].wait(TIME_OUT_SECONDS):
                raise RuntimeError(log.read_text()[-2000:])
        finally:
            for program in programs.values():
                program.send_signal(signal.SIGTERM)
            for program in programs.values():
                program.wait()
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    return [r["seconds"] for r in rounds if r["server_round"] > 1], memory.most


def write_gpt2(folder: Path) -> None:
    """Write a random network of GPT-2 small's shape, with the bundled model's tokenizer."""
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for path in ASSETS.glob("tokenizer*"):
        shutil.copy(path, folder)


# --- plain Flower -------------------------------------------------------------------------------


def plain(folder: Path, num_rounds: int, _: int) -> Found:
    """Let two ClientApps return an adapter of 1 MB."""
    return flower_alone(folder, num_rounds, "    pass")


def cold_gpt2(folder: Path, num_rounds: int, _: int) -> Found:
    """Let two ClientApps load an emulator of GPT-2 small's shape and make a step of one block."""
    write_gpt2(folder / "gpt2")
    work = COLD_WORK.format(model=str(folder / "gpt2"), block_size=BLOCK_SIZE)
    return flower_alone(folder, num_rounds, work)


def flower_alone(folder: Path, num_rounds: int, work: str) -> Found:
    """Run FedAvg's own loop; return what each round but the first took."""
    times = folder / "times.json"
    write_app(folder / "app", times, 10**6, num_rounds + 1, work)
    with plain_flower(folder, folder / "app") as programs, Memory(programs) as memory:
        deadline = time.monotonic() + TIME_OUT_SECONDS
        moments: list[float] = []
        while len(moments) < num_rounds + 2:
            if time.monotonic() > deadline:
                raise TimeoutError((folder / "log.txt").read_text()[-2000:])
            time.sleep(0.5)
            if times.exists():
                moments = read_moments(times, moments)
    ends = moments[1:]
    return [b - a for a, b in pairwise(ends)], memory.most


def read_moments(path: Path, before: list[float]) -> list[float]:
    """Return the moments in a file that may be half written."""
    try:
        return list(json.loads(path.read_text()))
    except ValueError:
        return before


class Memory:
    """The most resident memory of each of some programs and of all that they start [MB]."""

    def __init__(self, programs: Iterable[subprocess.Popen[bytes]]) -> None:
        self._programs = list(programs)
        self.most: dict[str, float] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(0.5):
            for program in self._programs:
                try:
                    top = psutil.Process(program.pid)
                    for process in [top, *top.children(recursive=True)]:
                        name, mb = kind_of(process.cmdline()), process.memory_info().rss / 1e6
                        self.most[name] = max(self.most.get(name, 0.0), mb)
                except psutil.Error:
                    continue


KINDS = ["superlink", "supernode", "superexec", "serverapp", "clientapp", "gate", "serve", "join"]


def kind_of(command: list[str]) -> str:
    """Return what a program is, by its command line."""
    words = [Path(word).name.removeprefix("flower-").removeprefix("flwr-") for word in command]
    words = [word.rpartition(".")[2] if word.startswith("fedpeat.") else word for word in words]
    return next((word for word in words if word in KINDS), "other")


Measure = Callable[[Path, int, int], Found]
PARTS: dict[str, tuple[str, Measure]] = {
    "process": ("4 devices in this process, adapter of 1.2 MB", in_process),
    "process-cpu": ("the same, processor time", partial(in_process, clock=time.process_time)),
    "warm": ("serve and join, adapter of 1 MB", warm),
    "plain": ("plain Flower, 2 nodes, torch, 1 MB", plain),
    "warm-gpt2": ("serve and join, GPT-2 small", warm_gpt2),
    "cold-gpt2": ("plain Flower, 2 nodes, GPT-2 small", cold_gpt2),
}


if __name__ == "__main__":
    main()
