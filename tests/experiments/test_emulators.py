"""Making emulators borrows the full model's weights, and leaves them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.experiments import emulators
from fedpeat.experiments.emulators import make_emulators
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.tasks import task_of
from fedpeat.model.blocks import find_blocks
from fedpeat.model.loading import LoadedModel
from outcomes import config_of

Make = Callable[[str, str], tuple[LoadedModel, EmulatorPackage]]


@pytest.fixture
def make(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Make:
    def made(recipe: str, dtype: str) -> tuple[LoadedModel, EmulatorPackage]:
        emulator = {"recipe": recipe, "distill_batch_size": 4, "dtype": dtype}
        config = config_of(model_dir, corpus_file, tmp_path, {"emulator": emulator})
        loaded = load_full_model(config)
        data = task_of(config).read(config, loaded)
        blocks = find_blocks(loaded.model)
        tuned = [0, blocks.num_blocks - 1]
        args = loaded, blocks, tuned, config.emulator, data, "perplexity"
        (package,) = make_emulators(*args, seed=0, observer=Silent()).values()
        return loaded, package

    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "recipe",
    [
        "layer_drop:0.5",
        "greedy:0.5+distill:512",
        "width:0.5+distill:512+int8",
        "heads:0.5+width:0.5",
        "int4",
    ],
)
def test_the_full_model_stays_as_it_was(
    recipe: str, dtype: str, make: Make, model_dir: Path
) -> None:
    loaded, _ = make(recipe, dtype)
    fresh = type(loaded.model).from_pretrained(model_dir, dtype=torch.float32).state_dict()
    state = loaded.model.state_dict()
    assert state.keys() == fresh.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, fresh[name])] == []


@pytest.mark.parametrize(
    ("recipe", "least", "most"),
    [("layer_drop:0.5", 1, 1), ("layer_drop:0.5+distill:512", 0.3, 0.9), ("int8", 1, 1)],
)
def test_only_weights_that_are_trained_are_copied(
    recipe: str, least: float, most: float, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def watched(student: nn.Module, parent: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = storages(student)
        shares.append(len(own & storages(parent)) / len(own))
        return pack_emulator(student, parent, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(emulators, "pack_emulator", watched)
    make(recipe, "float32")
    assert least <= shares[0] <= most


def storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}
