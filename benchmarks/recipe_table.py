"""Recipes side by side: what an emulator weighs, costs, is worth alone, and does for the model.

Reads the runs that ``fedpeat compare benchmarks/recipes.yaml`` has left, the audits of those that
were audited, and measures steps and memory of the first seed's emulators here, all in turn and over
again, so that whatever else the machine does meets them alike.

    python benchmarks/recipe_table.py build/benchmarks/runs/recipes-stdlib [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fedpeat.adapter.placement import tuned_blocks
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.loading import load_config
from fedpeat.config.schema import AdapterConfig
from fedpeat.data.packing import PackedText
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.results import gap_closed
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.report.intervals import estimate
from fedpeat.tuning.local import LocalSettings, train

COLUMNS = (
    "Variant", "Recipe", "Middle's bytes", "Emulator", "Emulator zero-shot", "Emulator tuned",
    "Plug-in", "Gap closed", "Gradient cosine", "Step", "Frozen weights in memory", "Recovered",
)  # fmt: skip
ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def recovered(self) -> float | None:
        """Share of the model's ability that the strongest attack got back, if it was audited."""
        path = self.folder / "audit.json"
        if not path.exists():
            return None
        (emulator,) = json.loads(path.read_text())["emulators"]
        value: float | None = emulator["recovered_ratio"]
        return value


@dataclass(frozen=True)
class Network:
    """A network with an adapter, what its frozen weights take, and the seconds of its steps."""

    tunable: Tunable
    resident_bytes: int
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", type=Path, help="folder of a comparison's runs")
    parser.add_argument("--steps", type=int, default=10, help="steps timed at once; 0 for none")
    args = parser.parse_args()
    runs = runs_of(args.runs)
    bounds = {r.summary["seed"]: r.summary["quality"]["plug_in"] for r in runs["fed_peft"]}
    rows = {name: own for name, own in runs.items() if own[0].summary["emulator"]}
    config = load_config(next(iter(rows.values()))[0].folder / "config.yaml")
    full = load_full_model(config)
    blocks = find_blocks(full.model, cut=config.model.cut)
    tuned = tuned_blocks(
        config.adapter.placement,
        blocks.num_blocks,
        config.adapter.num_bottom,
        config.adapter.num_top,
    )
    middle = middle_bytes(blocks, tuned, full.model, full.storage_dtype)
    networks = {}
    for name, (first, *_) in rows.items():
        package = EmulatorPackage.load(first.folder / "emulator")
        model = package.build(torch.device("cpu"), torch.float32)
        networks[name] = network_of(
            model, blocks, tuned, config.adapter, package.manifest.source_blocks
        )
    whole = network_of(full.model, blocks, tuned, config.adapter, range(blocks.num_blocks))
    time_in_turn([whole, *networks.values()], args.steps)
    print(f"Full model: step {step_text(whole)}, {whole.resident_bytes / 1e6:.2f} MB in memory.\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|:--|:--" + "|--:" * (len(COLUMNS) - 2) + "|")
    for name, own in rows.items():
        kept = manifest_of(own[0])
        cells = [
            name,
            kept["recipe"],
            f"{bytes_between(kept, tuned) / middle:.0%}",
            f"{kept['num_bytes'] / 1e6:.2f} MB",
            *quality_cells(own, bounds),
            *cost_cells(networks[name], whole),
            number([run.recovered for run in own], percent=True),
        ]
        print("| " + " | ".join(cells) + " |")


def runs_of(folder: Path) -> dict[str, list[Run]]:
    """Return the finished runs of a comparison by variant, in the order in which they ended."""
    runs: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*-seed*/summary.json"), key=lambda p: p.stat().st_mtime):
        run = Run(path.parent, json.loads(path.read_text()))
        runs.setdefault(re.sub(r"-seed\d+$", "", path.parent.name), []).append(run)
    return runs


def manifest_of(run: Run) -> dict[str, Any]:
    """Return the manifest of a run's emulator."""
    manifest: dict[str, Any] = json.loads((run.folder / "emulator" / "manifest.json").read_text())
    return manifest


def bytes_between(manifest: Mapping[str, Any], tuned: Sequence[int]) -> int:
    """Return the bytes of an emulator's blocks that are not tuned."""
    middle = {f"block {i}" for i in manifest["source_blocks"] if i not in tuned}
    return sum(part["num_bytes"] for part in manifest["parts"] if part["name"] in middle)


def quality_cells(runs: Sequence[Run], bounds: Mapping[int, float]) -> list[str]:
    """Return what the emulators of a variant are worth, and what the full model became."""
    quality = [run.summary["quality"] for run in runs]
    gaps = [
        gap_closed(q["full_zero_shot"], q["plug_in"], bounds.get(run.summary["seed"]))
        for q, run in zip(quality, runs, strict=True)
    ]
    cosines = [run.summary["emulator"]["fidelity"].get("gradient_cosine") for run in runs]
    names = ("emulator_zero_shot", "emulator_tuned", "plug_in")
    return [
        *(number([q[name] for q in quality]) for name in names),
        number(gaps, percent=True),
        number(cosines),
    ]


def cost_cells(network: Network, whole: Network) -> list[str]:
    """Return the time of a step, also in steps of the full model, and the memory of the weights."""
    ratios = [a / b for a, b in zip(network.seconds, whole.seconds, strict=True)]
    step = f"{step_text(network)}, x{statistics.median(ratios):.2f}" if ratios else "-"
    return [step, f"{network.resident_bytes / 1e6:.2f} MB"]


def number(values: Sequence[float | None], *, percent: bool = False) -> str:
    """Return mean and half width of the 95 % interval over the seeds."""
    found = estimate(values)
    if found is None:
        return "-"
    if percent:
        half = "" if found.half_width is None else f" ± {100 * found.half_width:.1f} pp"
        return f"{100 * found.mean:.1f} %{half}"
    digits = 2 if abs(found.mean) < 100 else 1
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def middle_bytes(
    blocks: Blocks, tuned: Sequence[int], model: torch.nn.Module, dtype: torch.dtype
) -> int:
    """Return the bytes of the full model's blocks that are not tuned, in its own type."""
    return sum(
        parameter.numel() * dtype.itemsize
        for index in range(blocks.num_blocks)
        if index not in tuned
        for _, part in blocks.parts(model, index)
        for parameter in part.parameters()
    )


def network_of(
    model: Any, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig, kept: Sequence[int]
) -> Network:
    """Attach the adapter to an emulator, or to the full model."""
    resident = stored_bytes(model)
    own = [index for index in tuned if index in kept]
    return Network(attach(model, blocks, own, config, kept=kept), resident)


def stored_bytes(model: torch.nn.Module) -> int:
    """Return the bytes that a network's parameters and buffers take, shared storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def time_in_turn(networks: Sequence[Network], num_steps: int) -> None:
    """Time steps of every network, one after the other, several times over."""
    ids = torch.randint(0, 1000, (64, 128), generator=torch.Generator().manual_seed(0)).numpy()
    data = PackedText(ids.astype("int32"), ids >= 0, ids.astype("int32") * 0 + 1)
    settings = LocalSettings(batch_size=8, learning_rate=1e-4)
    for turn in range(ROUNDS + 1 if num_steps else 0):
        for one in networks:
            stats = train(one.tunable, data, settings, num_steps=num_steps, first_step=0, seed=0)
            if turn:  # the first is to warm up
                one.seconds.append(stats.seconds / num_steps)


def step_text(network: Network) -> str:
    """Return the median time of a step."""
    return f"{1e3 * statistics.median(network.seconds):.0f} ms" if network.seconds else "-"


if __name__ == "__main__":
    main()
