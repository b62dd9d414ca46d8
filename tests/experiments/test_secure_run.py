"""Runs whose devices mask their updates: what comes of them, and which settings they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeat.config.loading import override
from fedpeat.core.errors import ConfigError
from fedpeat.experiments import security
from fedpeat.experiments.run import run
from outcomes import assert_resumes, config_of, folder_of, lines_of

SECURE: dict[str, Any] = {"federated": {"secure_aggregation": True}}


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


ON_A_LADDER: dict[str, Any] = {
    "emulator": {"lower_rungs": [0.25]},
    "federated": {
        "client_rungs": [0.5, 0.25],
        "client_weighting": "examples",
        "lora_aggregation": "rolora",
        "clip_norm": 0.05,  # on the device, with masks
    },
}


@pytest.mark.parametrize("changes", [{}, ON_A_LADDER], ids=["plain", "on a ladder"])
def test_a_run_with_masked_updates_ends_where_a_plain_one_does(
    changes: dict[str, Any], model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    plain = config_of(model_dir, corpus_file, tmp_path, {**changes, "name": "plain"})
    secure = override(plain, {**SECURE, "name": "secure"})
    run(plain)
    run(secure)
    one, other = (adapter_of(folder_of(config)) for config in (plain, secure))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, atol=2e-5, rtol=0)
    for line, masked in zip(lines_of(folder_of(plain)), lines_of(folder_of(secure)), strict=True):
        assert masked["num_tokens"] == line["num_tokens"]
        assert masked["train_loss"] == pytest.approx(line["train_loss"], abs=1e-3)
        assert masked["warnings"] == []
        devices = [p for p in masked["participants"] if p["role"] == "device"]
        assert all(p["num_examples"] == p["num_tokens"] == 0 for p in devices)
        assert all(p["first_loss"] is p["last_loss"] is None for p in devices)
        assert all(p["status"] == "accepted" for p in devices)


def test_a_resumed_run_with_masked_updates_is_bit_identical(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    changes = {"federated": {**SECURE["federated"], "dropout_ratio": 0.2, "num_rounds": 3}}
    assert_resumes(config_of(model_dir, corpus_file, tmp_path, changes), interrupted_after=1)
    statuses = {
        p["status"]
        for line in lines_of(tmp_path / "tiny")
        for p in line["participants"]
        if p["role"] == "device"
    }
    assert statuses == {"accepted", "dropped"}


def test_a_run_with_too_few_devices_to_hide_among_does_not_begin(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    changes = {"federated": {**SECURE["federated"], "fraction_train": 0.5}}
    with pytest.raises(ConfigError, match="at least federated.secure_min_devices = 3 .* got 2"):
        run(config_of(model_dir, corpus_file, tmp_path, changes))


def test_without_its_libraries_the_extra_is_named(
    model_dir: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model_dir, corpus_file, tmp_path, SECURE)
    monkeypatch.setattr(security, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "fedpeat\[flower\]"'):
        security.simulated_sides(config, ["a", "b", "c"])
