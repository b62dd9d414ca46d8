"""What a run records of how faithful its emulator is, and that recording it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import Config
from fedpeat.experiments.fidelity import Probe
from fedpeat.experiments.run import run
from tiny import tiny_settings


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    settings = config_from_dict(tiny_settings(model_dir, corpus_file, tmp_path))
    return override(settings, {"federated": {"num_rounds": 1}})


def fidelity_of(folder: Path) -> dict[str, float]:
    manifest = json.loads((folder / "emulator" / "manifest.json").read_text())
    found: dict[str, float] = manifest["fidelity"]
    return found


def test_a_run_records_agreement_and_says_it_in_its_log(config: Config, tmp_path: Path) -> None:
    summary = run(config)
    fidelity = fidelity_of(tmp_path / "tiny")
    assert summary["emulator"]["fidelity"] == fidelity
    names = ("gradient_cosine", "gradient_cosine_tuned")
    expected = {f"{name}{block}" for name in names for block in ("", "_block_0", "_block_5")}
    assert fidelity.keys() >= expected | {"hidden_cosine", "logit_kl", "top1_agreement"}
    assert all(-1 <= fidelity[name] <= 1 for name in expected)
    assert fidelity["hidden_relative_error"] == pytest.approx(fidelity["hidden_error"] ** 0.5, 0.1)
    line = f"adapter-gradient cosine {fidelity['gradient_cosine']:.3f}, after some steps"
    assert line in (tmp_path / "tiny" / "log.txt").read_text()


def test_measuring_does_not_change_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = run(config)
    monkeypatch.setattr(Probe, "of", lambda _: None)
    plain = run(override(config, {"name": "plain"}))
    assert plain["quality"] == measured["quality"]
    assert "gradient_cosine" not in fidelity_of(tmp_path / "plain")


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"placement": "all"}},
        {"adapter": {"method": "none"}},
        {"adapter": {"method": "prompt", "num_virtual_tokens": 4}},
        {"emulator": {"recipe": "int8"}},
    ],
    ids=str,
)
def test_gradients_are_compared_for_any_adapter_and_emulator(
    config: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(override(config, {**changes, "federated": {"num_rounds": 0}}))
    fidelity = fidelity_of(tmp_path / "tiny")
    if "emulator" in changes:  # rounding to 8 bits hardly moves anything
        assert fidelity["gradient_cosine"] > 0.99
        assert fidelity["gradient_cosine_tuned"] > 0.99
    assert -1 < fidelity["gradient_cosine"] < 1
