"""Codecs of updates, end to end on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.run import run
from outcomes import assert_resumes, config_of, folder_of, lines_of


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    parts = {"data": {"partition": "iid", "num_clients": 5, "key_field": None}}
    return config_of(model_dir, corpus_file, tmp_path, {"adapter": {"r": 8}, **parts})


def test_devices_on_a_ladder_tune_with_fewer_bytes(config: Config) -> None:
    ladder = {
        "emulator": {"recipe": "layer_drop:0.75", "lower_rungs": [0.5]},
        "adapter": {"placement": "all"},
        "local": {"local_steps": 6},
        "federated": {"update_codec": "int8", "client_rungs": [0.75, 0.5], "clip_to_median": True},
    }
    summary = run(override(override(config, ladder), {"federated": {"num_rounds": 1}}))
    assert summary["quality"]["plug_in"] < summary["quality"]["full_zero_shot"]
    line = lines_of(folder_of(config))[1]
    assert {p["status"] for p in line["participants"]} == {"accepted"}
    assert line["bytes_up"] < 0.5 * line["bytes_up_plain"]
    for key in ("bytes_up", "bytes_up_plain"):
        assert line[key] == sum(p[key] for p in line["participants"])


def test_what_plain_float32_would_cost_is_what_it_costs(config: Config) -> None:
    short = {"num_rounds": 1, "lora_aggregation": "svd", "client_ranks": [4, 2]}
    run(override(config, {"federated": {**short, "update_codec": "bf16"}}))
    run(override(config, {"federated": short, "name": "plain"}))
    line, plain = (lines_of(folder_of(config).parent / name)[1] for name in (config.name, "plain"))
    assert plain["bytes_up"] == plain["bytes_up_plain"] == line["bytes_up_plain"]
    assert line["bytes_up"] < 0.8 * plain["bytes_up"]
    own = [p["bytes_up_plain"] for p in line["participants"]]
    assert own == [p["bytes_up"] for p in plain["participants"]]


def test_a_run_that_is_resumed_ends_bit_identical(config: Config) -> None:
    hard = {"num_rounds": 3, "fraction_train": 0.7, "dropout_ratio": 0.2}  # B, A, and B again
    chosen = {"update_codec": "topk", "lora_aggregation": "rolora"}
    assert_resumes(override(config, {"federated": {**hard, **chosen}}), interrupted_after=2)


def test_topk_is_refused_with_a_rule_that_takes_the_middle_of_entries(config: Config) -> None:
    with pytest.raises(ConfigError, match="robust_rule must be mean or multi_krum for .*'topk'"):
        override(config, {"federated": {"update_codec": "topk", "robust_rule": "median"}})


@pytest.mark.parametrize("method", METHODS)
def test_devices_that_send_to_nobody_have_no_codec(method: str, config: Config) -> None:
    chosen = override(config, {"federated": {"update_codec": "int8"}})
    codec = METHODS[method].settings(chosen).federated.update_codec
    assert codec == ("float32" if method in {"local", "centralized"} else "int8")
