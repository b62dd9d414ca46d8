"""Emulators with fewer neurons and heads under an adapter on every block, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.core.run_folder import RunFolder
from fedpeat.core.wire import decode
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.evaluate import evaluate_adapter
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.run import run
from fedpeat.experiments.steering import make_controller
from fedpeat.federated.rounds import FederationState
from fedpeat.model.layers import matrix_of
from outcomes import UNSTEADY, assert_resumes, config_of, lines_of

NARROW: dict[str, Any] = {
    "emulator": {"recipe": "layer_drop:0.75+width:0.5+heads:0.5", "lower_rungs": [0.5]},
    "federated": {"client_rungs": [0.75, 0.5]},
    "adapter": {"placement": "all"},
}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, NARROW)


def bench_of(config: Config, folder: Path) -> Bench:
    return set_up(config, RunFolder(folder), Silent(), None, pools_data=False)


def test_what_narrow_devices_learn_helps_the_full_model(config: Config, tmp_path: Path) -> None:
    longer = {"federated": {"num_rounds": 8}, "local": {"local_steps": 6}}
    summary = run(override(config, longer))
    lines = lines_of(tmp_path / "tiny")[1:]
    assert {p["status"] for line in lines for p in line["participants"]} == {"accepted"}
    quality = summary["quality"]
    assert quality["plug_in"] < 0.9 * quality["full_zero_shot"]
    assert evaluate_adapter(tmp_path / "tiny")["perplexity"] == quality["plug_in"]


def test_a_round_of_narrow_devices_leaves_the_others_entries_alone(
    config: Config, tmp_path: Path
) -> None:
    bench = bench_of(override(config, {"server": {"participates": False}}), tmp_path)
    federation = make_federation(bench, make_controller(bench))
    start = bench.server.state()
    state, _ = federation.run_round(FederationState(0, start), None)
    slices = federation.rungs["0.75"].slices
    assert len(slices) == 4 * 7  # of each kept block q, k, v, o and gate, up, down
    for name, part in slices.items():
        gone = np.setdiff1d(np.arange(start[name].shape[part.axis]), part.indices)
        old, new = (np.delete(s[name], part.indices, part.axis) for s in (start, state.adapter))
        assert old.size > 0 < len(gone)
        np.testing.assert_array_equal(new, old)
    moved = [n for n, p in slices.items() if not np.array_equal(state.adapter[n], start[n])]
    assert len(moved) == len(slices)


def test_the_kept_rows_are_those_of_the_full_model(config: Config, tmp_path: Path) -> None:
    bench = bench_of(config, tmp_path)
    for package in bench.packages.values():
        built = package.build(torch.device("cpu"), torch.float32)
        names = package.own_names(key.rpartition(".")[0] for key in package.kept)
        compared = 0
        for key, indices in package.kept.items():
            name, _, side = key.rpartition(".")
            if side == "rows":  # columns were fitted anew
                whole = matrix_of(bench.server.network.get_submodule(f"{name}.base_layer"))
                own = matrix_of(built.get_submodule(names[name]))
                assert torch.equal(own, whole[list(indices)])
                compared += 1
        assert compared == 5 * len(package.manifest.source_blocks)


def test_devices_are_told_no_row_and_sent_their_entries(config: Config, tmp_path: Path) -> None:
    bench = bench_of(config, tmp_path)
    for name, rung in bench.rungs().items():
        record = decode(rung.hold_message(rung.parts, [])).record
        package = bench.packages[name]
        rows = [str(list(own))[1:-1] for own in package.kept.values()]
        assert rows
        assert not any(row in str(record) for row in rows)
        device = bench.shelf.get(rung.sha256)
        assert {n: a.shape for n, a in rung.own(bench.server.state()).items()} == device.shapes


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_rules_that_are_exact_stay_so(rule: str, config: Config, tmp_path: Path) -> None:
    run(override(config, {"federated": {"lora_aggregation": rule, "num_rounds": 4}}))
    for line in lines_of(tmp_path / "tiny")[1:]:
        assert {p["status"] for p in line["participants"]} == {"accepted"}
        assert line["product_error"] < 1e-12


def test_plain_averaging_is_measured_where_all_have_entries(config: Config, tmp_path: Path) -> None:
    run(config)
    assert all(0 < line["product_error"] < 1 for line in lines_of(tmp_path / "tiny")[1:])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_is_resumed_ends_bit_identical(rank: int, config: Config) -> None:
    hard = {
        "adapter": {"lora_dropout": 0.1},
        "emulator": {"distill_batch_size": 4},
        "server": {"realign_every": 1, "realign_tokens": 256, "realign_rank": rank},
        "federated": UNSTEADY,
    }
    assert_resumes(override(config, hard), 2)


@pytest.mark.parametrize("method", ["fed_peft", "fed_ft", "centralized", "local", "zero_shot"])
def test_rivals_that_tune_no_narrow_block_as_a_whole_take_the_settings(
    method: str, config: Config
) -> None:
    changed = METHODS[method].settings(config)
    assert (changed.emulator.recipe == "full") == (method != "local")


def test_gradients_are_compared_where_both_have_entries(config: Config, tmp_path: Path) -> None:
    whole = {"emulator": {"recipe": "width:1", "lower_rungs": []}, "federated": {"num_rounds": 0}}
    run(override(config, {**whole, "federated": {"client_rungs": [], "num_rounds": 0}}))
    fidelity = EmulatorPackage.load(tmp_path / "tiny" / "emulator").manifest.fidelity
    assert fidelity["gradient_cosine"] > 0.99
    assert fidelity["gradient_cosine_tuned"] > 0.99
    half = {"name": "half", "adapter": {"target_modules": ["up_proj"]}}  # all of B is in part
    run(override(config, {**half, "federated": {"num_rounds": 0}}))
    fidelity = EmulatorPackage.load(tmp_path / "half" / "emulator").manifest.fidelity
    assert all(f"gradient_cosine_block_{i}" in fidelity for i in (0, 5))
