"""What a run leaves behind, to be compared with what another one left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import Config
from fedpeat.experiments.run import run
from tiny import tiny_settings

TIMES = {"seconds", "elapsed_seconds", "peak_rss_bytes"}

PLAIN: dict[str, Any] = {}
EVERYTHING_ON: dict[str, Any] = {
    "adapter": {"lora_dropout": 0.1},
    "local": {"warmup_steps": 5, "proximal_mu": 0.01},
    "emulator": {"recipe": "layer_drop:0.5+distill:256", "distill_batch_size": 4},
    "federated": {
        "server_optimizer": "fedadam",
        "server_learning_rate": 0.01,
        "dropout_ratio": 0.3,
        "fraction_train": 0.5,
    },
}

UNSTEADY: dict[str, Any] = {  # rounds whose state is more than the adapter
    "num_rounds": 4,
    "dropout_ratio": 0.3,
    "fraction_train": 0.7,
    "server_optimizer": "fedadam",
    "server_learning_rate": 0.01,
}


def config_of(
    model_dir: Path, corpus_file: Path, folder: Path, changes: Mapping[str, Any]
) -> Config:
    config = config_from_dict(tiny_settings(model_dir, corpus_file, folder))
    return override(config, changes)


def folder_of(config: Config) -> Path:
    return Path(config.output_dir) / config.name


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result_of(folder: Path) -> dict[str, Any]:
    """Return all of a run's result that must not depend on how often it was killed."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines_of(folder)]
    for line in lines:
        line["participants"] = [
            {k: v for k, v in p.items() if k not in TIMES} for p in line["participants"]
        ]
    emulator = folder / "emulator" / "model.safetensors"
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "emulator": emulator.read_bytes() if summary["emulator"] else None,
        "quality": summary["quality"],
        "best_round": summary["best_round"],
        "bytes": [summary["cost"][k] for k in ("bytes_down", "bytes_up", "num_tokens")],
        "rounds": lines,
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two results differ, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{where}/{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {str(one)[:80]} != {str(other)[:80]}"]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert differences(one, other) == []


def assert_resumes(config: Config, interrupted_after: int) -> None:
    """Run as a whole, under the name "whole", and in two goes, and compare bit by bit."""
    whole = override(config, {"name": "whole"})
    run(whole)
    assert_resumes_to(folder_of(whole), config, interrupted_after)


def assert_resumes_to(whole: Path, config: Config, interrupted_after: int) -> None:
    """Run in two goes, and compare bit by bit with the folder of a run of the same settings."""
    run(override(config, {"federated": {"num_rounds": interrupted_after}}))
    run(config, resume=True)
    assert_same(result_of(whole), result_of(folder_of(config)))
