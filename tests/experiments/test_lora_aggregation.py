"""Ways of aggregating LoRA, end to end on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeat.adapter.tunable import read_adapter
from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.core.errors import AdapterError
from fedpeat.experiments.evaluate import evaluate_adapter
from fedpeat.experiments.run import run
from outcomes import assert_resumes_to, config_of, folder_of, lines_of

RULES: dict[str, dict[str, Any]] = {
    "average": {},
    "ffa": {"lora_aggregation": "ffa"},
    "rolora": {"lora_aggregation": "rolora"},
    "svd": {"lora_aggregation": "svd"},
    "svd, three ranks": {"lora_aggregation": "svd", "client_ranks": [2, 4, 1]},
}
HARD = {
    "adapter": {"r": 4, "lora_dropout": 0.1},
    "local": {"warmup_steps": 5, "proximal_mu": 0.01},
    "federated": {"num_rounds": 5, "dropout_ratio": 0.3, "fraction_train": 0.5},
}
WITH_MOMENTS = {"server_optimizer": "fedadam", "server_learning_rate": 0.01}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, {"adapter": {"r": 4}})


@pytest.fixture(scope="module")
def tuned(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Return a function that tunes by a rule once: the folder, to be read, and the summary."""
    folder = tmp_path_factory.mktemp("tuned")
    config = config_of(model_dir, corpus_file, folder, {"adapter": {"r": 4}})

    @cache
    def made(rule: str) -> tuple[Path, dict[str, Any]]:
        longer = {"federated": {"num_rounds": 6, **RULES[rule]}, "local": {"local_steps": 6}}
        return folder / rule, run(override(config, {"name": rule, **longer}))

    return made


def checkpoint_of(folder: Path, server_round: int, part: str) -> dict[str, np.ndarray]:
    path = folder / "checkpoints" / f"round-{server_round:05d}" / "tensors.safetensors"
    return {n.removeprefix(part): a for n, a in load_file(path).items() if n.startswith(part)}


def devices_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in line["participants"] if p["role"] == "device"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_tunes_and_its_adapter_survives_the_trip_to_disk(
    rule: str, tuned: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    folder, summary = tuned(rule)
    participants = [p for line in lines_of(folder) for p in line["participants"]]
    assert {p["status"] for p in participants} == {"accepted"}
    quality = summary["quality"]
    assert quality["plug_in"] < 0.97 * quality["full_zero_shot"]
    assert evaluate_adapter(folder)["perplexity"] == quality["plug_in"]


@pytest.mark.parametrize("rule", RULES)
def test_every_round_reports_its_product_error(
    rule: str, tuned: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    folder, _ = tuned(rule)
    errors = [line["product_error"] for line in lines_of(folder)]
    assert errors[0] is None
    exact = rule in {"ffa", "rolora"}
    assert all(error < 1e-12 if exact else 1e-6 < error < 2 for error in errors[1:]), errors
    assert "Product error" in (folder / "report.html").read_text()


@pytest.mark.parametrize("method", ["ia3", "prompt", "none"])
def test_without_lora_there_is_no_product_error(
    method: str, config: Config, tmp_path: Path
) -> None:
    changes = {"adapter": {"method": method, "num_virtual_tokens": 4}}
    run(override(config, {**changes, "federated": {"num_rounds": 1}}))
    assert [line["product_error"] for line in lines_of(tmp_path / "tiny")] == [None, None]


def test_ffa_leaves_a_as_the_seed_made_it(
    config: Config, tuned: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    run(override(config, {"name": "untuned", "method": "zero_shot"}))
    start = read_adapter(tmp_path / "untuned" / "adapter")
    for name, array in checkpoint_of(tuned("ffa")[0], 6, "adapter/").items():
        assert (array.tobytes() == start[name].tobytes()) == (".lora_A." in name), name


@pytest.fixture(scope="module")
def wide(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the settings of a run of plain averaging with a high rank, which is there."""
    changes = {"adapter": {"r": 32}, "federated": {"num_rounds": 5}}
    config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("wide"), changes)
    run(config)
    return config


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_bytes_are_about_half_both_ways(rule: str, wide: Config, tmp_path: Path) -> None:
    run(override(wide, {"output_dir": str(tmp_path), "federated": RULES[rule]}))
    plain, half = lines_of(folder_of(wide)), lines_of(tmp_path / "tiny")
    for way in ("bytes_down", "bytes_up"):
        # from the second round on, when all have the emulator and the frozen part; two rounds of
        # each kind, since A and B are not of one size
        sums = [
            sum(p[way] for line in lines[2:] for p in devices_of(line)) for lines in (plain, half)
        ]
        assert 0.45 < sums[1] / sums[0] < 0.6, way


def test_lower_ranks_cost_fewer_bytes(config: Config, tmp_path: Path) -> None:
    changes = {"adapter": {"r": 16}, "federated": {**RULES["svd"], "client_ranks": [8, 16, 4]}}
    run(override(config, changes))
    devices = devices_of(lines_of(tmp_path / "tiny")[2])
    assert [p["client_id"] for p in devices] == sorted(p["client_id"] for p in devices)
    for way in ("bytes_down", "bytes_up"):
        half, full, quarter, again = (p[way] for p in devices)  # the list goes round
        assert half == pytest.approx(again, rel=0.02)  # losses have more or fewer digits
        assert 0.45 < half / full < 0.65
        assert 0.25 < quarter / full < 0.5


@pytest.fixture(scope="module")
def never_interrupted(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Config]:
    """Return a function that makes a run by a rule once, and returns its settings."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def made(rule: str) -> Config:
        moments = {} if rule.startswith("svd") else WITH_MOMENTS
        config = config_of(model_dir, corpus_file, folder / rule, HARD)
        config = override(config, {"federated": {**RULES[rule], **moments}})
        run(config)
        return config

    return made


@pytest.mark.parametrize(
    ("rule", "interrupted_after"),
    [("rolora", 1), ("rolora", 2), ("ffa", 1), ("svd, three ranks", 2)],
)
def test_a_run_that_is_resumed_ends_bit_identical(
    rule: str, interrupted_after: int, never_interrupted: Callable[[str], Config], tmp_path: Path
) -> None:
    config = never_interrupted(rule)
    own = override(config, {"output_dir": str(tmp_path)})
    assert_resumes_to(folder_of(config), own, interrupted_after)
    for part in ("adapter/", "moments/"):
        whole, again = (checkpoint_of(folder_of(c), 5, part) for c in (config, own))
        assert {n: a.tobytes() for n, a in whole.items()} == {
            n: a.tobytes() for n, a in again.items()
        }


@pytest.mark.parametrize("method", ["fed_eat", "fed_ft", "centralized", "local", "zero_shot"])
def test_methods_with_nothing_of_the_kind_to_aggregate_run_all_the_same(
    method: str, config: Config
) -> None:
    config = override(config, {"method": method, "federated": {"num_rounds": 1}})
    plain = run(override(config, {"name": "plain"}))
    changes = {"federated": {"lora_aggregation": "svd", "client_ranks": [1]}}
    assert run(override(config, changes))["quality"] == plain["quality"]


def test_the_upper_bound_is_tuned_by_the_same_rule(config: Config, tmp_path: Path) -> None:
    run(override(config, {"federated": RULES["ffa"], "evaluation": {"full_tuned": True}}))
    errors = [line["product_error"] for line in lines_of(tmp_path / "tiny" / "full_tuned")]
    assert max(errors[1:]) < 1e-12


def test_an_adapter_that_is_not_all_pairs_is_refused_before_anything_is_written(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT has LoRA for embeddings and convolutions; no block of a language model here has any.
    monkeypatch.setattr("fedpeat.adapter.lora._A", ".lora_embedding_A")
    with pytest.raises(AdapterError, match="must have pairs of matrices .* and nothing else"):
        run(override(config, {"federated": RULES["svd"]}))
    assert not (tmp_path / "tiny").exists()
