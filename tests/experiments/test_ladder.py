"""A ladder of emulators in one federation, end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.core.run_folder import RunFolder
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.evaluate import evaluate_adapter
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.run import run
from fedpeat.experiments.steering import make_controller
from fedpeat.federated.rounds import FederationState
from outcomes import (
    UNSTEADY,
    assert_resumes,
    assert_same,
    config_of,
    folder_of,
    lines_of,
    result_of,
)

LADDER: dict[str, Any] = {
    "emulator": {"recipe": "layer_drop:0.75", "lower_rungs": [0.5, 0.25]},
    "federated": {"client_rungs": [0.75, 0.5, 0.25]},
}
DISTILLED: dict[str, Any] = {
    "emulator": {"recipe": "layer_drop:0.75+distill:256", "distill_batch_size": 4}
}
COMPACT: dict[str, Any] = {
    "emulator": {
        "recipe": "layer_drop:0.75+width:0.5+distill:256+int8",
        "distill_batch_size": 4,
    }
}
EVERYWHERE: dict[str, Any] = {"adapter": {"placement": "all"}}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, LADDER)


def rungs_of(folder: Path) -> dict[str, EmulatorPackage]:
    paths = {"0.75": folder / "emulator", **{n: folder / "rungs" / n for n in ("0.5", "0.25")}}
    return {name: EmulatorPackage.load(path) for name, path in paths.items()}


def devices_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in line["participants"] if p["role"] == "device"]


@pytest.mark.parametrize("placement", ["ends", "top", "all"])
def test_devices_of_three_rungs_tune_one_adapter(
    placement: str, config: Config, tmp_path: Path
) -> None:
    longer = {"federated": {"num_rounds": 8}, "local": {"local_steps": 6}}
    summary = run(override(config, {**longer, "adapter": {"placement": placement}}))
    lines = lines_of(tmp_path / "tiny")[1:]
    assert [p["rung"] for p in devices_of(lines[0])] == ["0.75", "0.5", "0.25", "0.75"]
    assert {p["status"] for line in lines for p in line["participants"]} == {"accepted"}
    quality = summary["quality"]
    assert quality["plug_in"] < 0.9 * quality["full_zero_shot"]
    assert evaluate_adapter(tmp_path / "tiny")["perplexity"] == quality["plug_in"]


def test_a_rung_counts_as_much_as_its_gradients_are_the_full_models(
    config: Config, tmp_path: Path
) -> None:
    trusts = trusts_of(config, tmp_path / "by fidelity")
    cosines = [
        package.manifest.fidelity["gradient_cosine_tuned"]
        for package in rungs_of(tmp_path / "by fidelity").values()
    ]
    assert cosines[0] > cosines[-1] > 0.1
    assert trusts == pytest.approx([cosine**2 for cosine in cosines])
    changes = {"federated": {"client_weighting": "examples"}}
    assert trusts_of(override(config, changes), tmp_path / "by examples") == [1, 1, 1]


def trusts_of(config: Config, path: Path) -> list[float]:
    folder = RunFolder(path)
    folder.create()
    bench = set_up(config, folder, Silent(), None, pools_data=False)
    folder.close()
    return [rung.trust for rung in bench.rungs().values()]


def test_a_rung_whose_gradients_turn_away_still_counts_a_little(
    config: Config, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    bench = set_up(config, folder, Silent(), None, pools_data=False)
    folder.close()
    first, second, third = bench.packages.values()
    bench.packages["0.5"] = second.with_fidelity({"gradient_cosine_tuned": -0.3})
    bench.packages["0.25"] = third.with_fidelity({"gradient_cosine": 0.5})
    trusts = [rung.trust for rung in bench.rungs().values()]
    known = first.manifest.fidelity["gradient_cosine_tuned"]
    assert trusts == pytest.approx([known**2, 0.01, 0.25])
    bench.packages["0.25"] = third.with_fidelity({})
    assert [rung.trust for rung in bench.rungs().values()] == [1, 1, 1]


@pytest.fixture(scope="module")
def ladders(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that makes a ladder once, in a run of no rounds, and gives its folder."""
    kinds = {"as cut": {}, "distilled": DISTILLED, "compact": COMPACT}

    @cache
    def made(kind: str) -> Path:
        config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("ladder"), LADDER)
        run(override(config, {**kinds[kind], "federated": {"num_rounds": 0}}))
        return folder_of(config)

    return made


@pytest.mark.parametrize("kind", ["as cut", "distilled", "compact"])
def test_a_rungs_blocks_are_those_of_the_rung_above_it(
    kind: str, ladders: Callable[[str], Path]
) -> None:
    large, medium, small = rungs_of(ladders(kind)).values()
    assert small.parts.keys() < medium.parts.keys() < large.parts.keys()
    assert [len(p.manifest.source_blocks) for p in (large, medium, small)] == [5, 4, 3]
    for package in (large, medium, small):
        package.build(torch.device("cpu"), torch.float32)


def test_distillation_trains_every_middle_block_of_every_rung(
    ladders: Callable[[str], Path],
) -> None:
    before = rungs_of(ladders("as cut"))["0.75"].parts.keys()
    after = rungs_of(ladders("distilled"))["0.75"]
    same = [part.name for part in after.manifest.parts if part.sha256 in before]
    assert same == ["outside", "block 0", "block 5"]


@pytest.fixture(scope="module")
def by_rule(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that tunes every block by a rule once, and gives the folder."""

    @cache
    def made(rule: str) -> Path:
        ranks = [2, 1, 2] if rule == "svd" else []
        changes = {"lora_aggregation": rule, "client_ranks": ranks, "num_rounds": 4}
        config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("by-rule"), LADDER)
        run(override(config, {**EVERYWHERE, "federated": changes}))
        return folder_of(config)

    return made


def test_a_smaller_rung_costs_fewer_bytes_both_ways(by_rule: Callable[[str], Path]) -> None:
    lines = lines_of(by_rule("average"))[1:]
    for line in lines:
        large, medium, small, _ = devices_of(line)
        for way in ("bytes_down", "bytes_up"):
            assert large[way] > medium[way] > small[way]
    first, second, *_ = lines
    assert all(p["bytes_emulator"] > 0 for p in devices_of(first))
    assert all(p["bytes_emulator"] == 0 for p in devices_of(second))


@pytest.mark.parametrize("rule", ["average", "ffa", "rolora", "svd"])
def test_every_rule_averages_a_block_over_the_rungs_that_have_it(
    rule: str, by_rule: Callable[[str], Path]
) -> None:
    lines = lines_of(by_rule(rule))[1:]
    assert {p["status"] for line in lines for p in line["participants"]} == {"accepted"}
    exact = rule in {"ffa", "rolora"}
    assert all(
        line["product_error"] < 1e-12 if exact else line["product_error"] > 0 for line in lines
    )


def test_a_run_that_is_resumed_ends_bit_identical(config: Config) -> None:
    hard = {
        **DISTILLED,
        "adapter": {"placement": "all", "lora_dropout": 0.1},
        "federated": UNSTEADY,
    }
    assert_resumes(override(config, hard), 2)


def test_on_the_top_rung_alone_a_ladder_changes_nothing(config: Config, tmp_path: Path) -> None:
    top = override(config, {"federated": {"client_rungs": [0.75]}})
    run(top)
    run(override(top, {"name": "single", "emulator": {"lower_rungs": []}}))
    one, other = (result_of(tmp_path / name) for name in ("tiny", "single"))
    for result in (one, other):  # the messages name the parts of all rungs
        result["rounds"] = [
            {k: v for k, v in line.items() if "bytes" not in k and k != "participants"}
            for line in result["rounds"]
        ]
        del result["bytes"]
    assert_same(one, other)


def after_a_round(config: Config, folder: Path, changes: dict[str, Any]) -> tuple[Bench, set[int]]:
    bench = set_up(override(config, changes), RunFolder(folder), Silent(), None, pools_data=False)
    federation = make_federation(bench, make_controller(bench))
    _, result = federation.run_round(FederationState(0, bench.server.state()), None)
    assert {p.status for p in result.participants} == {"accepted"}
    packages = bench.packages.values()
    models = [bench.shelf.get(package.manifest.sha256).model for package in packages]
    parameters: list[torch.nn.Parameter] = [p for model in models for p in model.parameters()]
    return bench, {p.untyped_storage().data_ptr() for p in parameters if not p.requires_grad}


def test_64_devices_on_three_rungs_have_the_frozen_storages_of_the_top_rung(
    config: Config, tmp_path: Path
) -> None:
    many = {
        "data": {"partition": "iid", "num_clients": 64, "key_field": None},
        "local": {"local_steps": 1},
    }
    ladder, storages = after_a_round(config, tmp_path / "ladder", many)
    assert len(ladder.participants) == 64
    assert len(ladder.packages) == 3
    one_rung = {**many, "emulator": {"lower_rungs": []}, "federated": {"client_rungs": []}}
    _, alone = after_a_round(config, tmp_path / "alone", one_rung)
    assert len(storages) == len(alone)


def test_the_summary_has_the_top_rung_and_a_list_of_all(config: Config, tmp_path: Path) -> None:
    summary = run(config)
    assert [rung["name"] for rung in summary["rungs"]] == ["0.75", "0.5", "0.25"]
    assert summary["emulator"] == {
        k: v for k, v in summary["rungs"][0].items() if k in summary["emulator"]
    }
    assert [rung["num_clients"] for rung in summary["rungs"]] == [2, 1, 1]
    for way in ("bytes_down", "bytes_up"):
        assert sum(rung[way] for rung in summary["rungs"]) == summary["cost"][way]
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text()) == summary
