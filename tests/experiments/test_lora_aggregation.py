"""Ways of aggregating LoRA, end to end on a tiny model."""

from __future__ import annotations

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
from outcomes import assert_resumes, config_of, lines_of

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


def checkpoint_of(folder: Path, server_round: int, part: str) -> dict[str, np.ndarray]:
    path = folder / "checkpoints" / f"round-{server_round:05d}" / "tensors.safetensors"
    return {n.removeprefix(part): a for n, a in load_file(path).items() if n.startswith(part)}


def devices_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in line["participants"] if p["role"] == "device"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_tunes_and_its_adapter_survives_the_trip_to_disk(
    rule: str, config: Config, tmp_path: Path
) -> None:
    longer = {"federated": {"num_rounds": 6, **RULES[rule]}, "local": {"local_steps": 6}}
    summary = run(override(config, longer))
    participants = [p for line in lines_of(tmp_path / "tiny") for p in line["participants"]]
    assert {p["status"] for p in participants} == {"accepted"}
    quality = summary["quality"]
    assert quality["plug_in"] < 0.97 * quality["full_zero_shot"]
    assert evaluate_adapter(tmp_path / "tiny")["perplexity"] == quality["plug_in"]


@pytest.mark.parametrize("rule", RULES)
def test_every_round_reports_its_product_error(rule: str, config: Config, tmp_path: Path) -> None:
    run(override(config, {"federated": RULES[rule]}))
    errors = [line["product_error"] for line in lines_of(tmp_path / "tiny")]
    assert errors[0] is None
    exact = rule in {"ffa", "rolora"}
    assert all(error < 1e-12 if exact else 1e-6 < error < 2 for error in errors[1:]), errors
    assert "Product error" in (tmp_path / "tiny" / "report.html").read_text()


@pytest.mark.parametrize("method", ["ia3", "prompt", "none"])
def test_without_lora_there_is_no_product_error(
    method: str, config: Config, tmp_path: Path
) -> None:
    changes = {"adapter": {"method": method, "num_virtual_tokens": 4}}
    run(override(config, {**changes, "federated": {"num_rounds": 1}}))
    assert [line["product_error"] for line in lines_of(tmp_path / "tiny")] == [None, None]


def test_ffa_leaves_a_as_the_seed_made_it(config: Config, tmp_path: Path) -> None:
    run(override(config, {"federated": RULES["ffa"]}))
    run(override(config, {"name": "untuned", "method": "zero_shot"}))
    start = read_adapter(tmp_path / "untuned" / "adapter")
    for name, array in checkpoint_of(tmp_path / "tiny", 3, "adapter/").items():
        assert (array.tobytes() == start[name].tobytes()) == (".lora_A." in name), name


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_bytes_are_about_half_both_ways(rule: str, config: Config, tmp_path: Path) -> None:
    wide = override(config, {"adapter": {"r": 32}, "federated": {"num_rounds": 5}})
    run(override(wide, {"name": "plain"}))
    run(override(wide, {"federated": RULES[rule]}))
    plain, half = lines_of(tmp_path / "plain"), lines_of(tmp_path / "tiny")
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


@pytest.mark.parametrize(
    ("rule", "interrupted_after"),
    [("rolora", 1), ("rolora", 2), ("ffa", 1), ("svd, three ranks", 2)],
)
def test_a_run_that_is_resumed_ends_bit_identical(
    rule: str, interrupted_after: int, model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    moments = {} if rule.startswith("svd") else WITH_MOMENTS
    config = config_of(model_dir, corpus_file, tmp_path, HARD)
    config = override(config, {"federated": {**RULES[rule], **moments}})
    assert_resumes(config, interrupted_after)
    for part in ("adapter/", "moments/"):
        whole, again = (checkpoint_of(tmp_path / n, 5, part) for n in ("whole", "tiny"))
        assert {n: a.tobytes() for n, a in whole.items()} == {
            n: a.tobytes() for n, a in again.items()
        }


@pytest.mark.parametrize("method", ["fed_eat", "fed_ft", "centralized", "local", "zero_shot"])
def test_methods_with_nothing_of_the_kind_to_aggregate_run_all_the_same(
    method: str, config: Config
) -> None:
    plain = run(override(config, {"method": method, "name": "plain"}))
    changes = {"method": method, "federated": {"lora_aggregation": "svd", "client_ranks": [1]}}
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
