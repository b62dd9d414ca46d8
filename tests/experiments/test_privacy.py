"""Privacy by choice, end to end on a tiny model."""

from __future__ import annotations

import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.core.errors import CheckpointError, ConfigError
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.run import run
from fedpeat.federated.accounting import epsilon_of
from outcomes import assert_resumes, assert_same, config_of, folder_of, lines_of, result_of

EXAMPLE = {"example_noise_multiplier": 0.8, "example_clip_norm": 0.1}
CLIENT = {"client_noise_multiplier": 0.5}
BOTH: dict[str, Any] = {
    "privacy": {**EXAMPLE, **CLIENT},
    "federated": {"clip_norm": 0.1, "fraction_train": 0.6, "num_rounds": 2},
}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, BOTH)


def test_a_run_says_what_it_spent_in_every_round_and_in_the_end(config: Config) -> None:
    summary = run(override(config, {"federated": {"fraction_train": 1.0}}))
    lines = lines_of(folder_of(config))
    delta = 1e-5
    for line in lines[1:]:
        on_devices = {p["client_id"]: p for p in line["participants"] if p["role"] == "device"}
        assert len(on_devices) == 4
        for part in on_devices.values():
            steps = 2 * line["server_round"]
            spent = epsilon_of({(0.8, 4 / part["num_examples"]): steps}, delta)
            assert part["epsilon"] == pytest.approx(spent, abs=1e-9)
            assert (part["first_loss"], part["last_loss"]) == (None, None)
        assert line["privacy"] == {
            "example_epsilon": max(p["epsilon"] for p in on_devices.values()),
            "client_epsilon": pytest.approx(epsilon_of({(0.5, 1.0): line["server_round"]}, delta)),
            "client_sample_rate": 1.0,
            "delta": delta,
        }
        (server,) = (p for p in line["participants"] if p["role"] == "server")
        assert server["epsilon"] is None
        assert server["first_loss"] is not None
    assert summary["privacy"] == {
        "delta": delta,
        "noise": "secret",
        "example": {
            "unit": "block of text",
            "epsilon": lines[-1]["privacy"]["example_epsilon"],
            "noise_multiplier": 0.8,
            "target_epsilon": None,
            "clip_norm": 0.1,
        },
        "client": {
            "epsilon": lines[-1]["privacy"]["client_epsilon"],
            "noise_multiplier": 0.5,
            "clip_norm": 0.1,
            "sample_rate": 1.0,
            "sampling": "none",
        },
    }
    report = (folder_of(config) / "report.html").read_text()
    assert "Epsilon of a block of text" in report
    assert "Epsilon of a device" in report


def test_a_run_without_privacy_says_nothing_of_it(config: Config) -> None:
    off = {"example_noise_multiplier": 0.0, "client_noise_multiplier": 0.0}
    summary = run(override(config, {"privacy": off, "federated": {"num_rounds": 1}}))
    assert summary["privacy"] is None
    assert [line["privacy"] for line in lines_of(folder_of(config))] == [{}, {}]
    assert not (folder_of(config) / "noise.key").exists()
    assert "Epsilon of" not in (folder_of(config) / "report.html").read_text()


def test_a_resumed_run_draws_the_noise_that_it_would_have_drawn(config: Config) -> None:
    all_of_them = {"privacy": {"noise": "seed"}, "federated": {"fraction_train": 1.0}}
    assert_resumes(override(config, all_of_them), 1)


def test_noise_comes_from_a_key_of_the_run_that_only_its_user_can_read(config: Config) -> None:
    short = override(config, {"federated": {"num_rounds": 1}})
    run(short)
    run(override(short, {"name": "other"}))
    key, other = folder_of(config) / "noise.key", folder_of(config).parent / "other"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes() != (other / "noise.key").read_bytes()
    one, another = lines_of(folder_of(config)), lines_of(other)
    assert one[0]["quality"] == another[0]["quality"]
    assert one[1]["update_norm"] != another[1]["update_norm"]
    copied = folder_of(config).parent / "copied"
    shutil.copytree(folder_of(config), copied)
    run(config, resume=True)
    run(override(config, {"name": "copied"}), resume=True)
    assert_same(result_of(folder_of(config)), result_of(copied))


def test_noise_from_the_seed_is_the_same_again(config: Config) -> None:
    config = override(config, {"privacy": {"noise": "seed"}})
    run(config)
    run(override(config, {"name": "again"}))
    assert not (folder_of(config) / "noise.key").exists()
    assert_same(result_of(folder_of(config)), result_of(folder_of(config).parent / "again"))


def test_a_damaged_key_is_refused_with_a_remedy(config: Config) -> None:
    run(override(config, {"federated": {"num_rounds": 1}}))
    (folder_of(config) / "noise.key").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="noise.key must have 32 bytes, got 5; remove it"):
        run(config, resume=True)


def test_a_target_is_reached_by_the_last_round_and_not_passed(config: Config) -> None:
    target = {"example_target_epsilon": 6.0, "example_noise_multiplier": 0.0}
    client = {"client_target_epsilon": 4.0, "client_noise_multiplier": 0.0}
    config = override(
        config, {"privacy": {**target, **client}, "federated": {"fraction_train": 1.0}}
    )
    summary = run(config)
    spent = summary["privacy"]
    assert 5.9 < spent["example"]["epsilon"] <= 6.0
    assert 3.95 < spent["client"]["epsilon"] <= 4.0
    epsilons = [p["epsilon"] for p in lines_of(folder_of(config))[-1]["participants"]]
    assert all(5.9 < e <= 6.0 for e in epsilons if e is not None)
    with pytest.raises(CheckpointError, match=r"num_rounds \(2 -> 3\)"):
        run(override(config, {"federated": {"num_rounds": 3}}), resume=True)


def test_noise_swamps_the_adapter_as_far_as_it_should(config: Config) -> None:
    loud = {"privacy": {"client_noise_multiplier": 50.0, **EXAMPLE}, "federated": {"num_rounds": 1}}
    run(override(config, {**loud, "server": {"participates": False}}))
    line = lines_of(folder_of(config))[1]
    tensors = load_file(folder_of(config) / "checkpoints" / "round-00001" / "tensors.safetensors")
    size = sum(a.size for n, a in tensors.items() if n.startswith("adapter/"))
    expected_cohort = 0.6 * 4
    assert line["update_norm"] == pytest.approx(50 * 0.1 / expected_cohort * np.sqrt(size), rel=0.1)
    assert line["privacy"]["client_sample_rate"] == 0.6


@pytest.mark.parametrize("method", METHODS)
def test_methods_hide_what_there_is_to_hide(method: str, config: Config) -> None:
    privacy = METHODS[method].settings(config).privacy
    alone = method in {"local", "centralized"}
    assert privacy.hides_clients == (not alone)
    assert privacy.hides_examples == (method != "centralized")


def test_without_the_accountant_a_private_run_is_refused_before_it_begins(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r'an accountant: pip install "fedpeat\[privacy\]"'):
        run(config)
    assert not folder_of(config).exists()
