"""Attacks on updates, end to end on a tiny model: they work where they must, defences tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeat.cli.main import main
from fedpeat.config.schema import PrivacyAuditPlan
from fedpeat.core.errors import ConfigError
from fedpeat.experiments.privacy_audit import audit_privacy
from fedpeat.experiments.run import run
from outcomes import config_of

PLAN = PrivacyAuditPlan(
    num_devices=3,
    num_examples=60,
    overfit_blocks=4,
    overfit_steps=30,
    inversion_tokens=8,
    num_texts=2,
    beam_width=4,
    example_noise=4.0,
    client_noise=4.0,
)
CHANGES: dict[str, Any] = {
    "federated": {"num_rounds": 1},
    "local": {"local_learning_rate": 0.02, "local_steps": 3},
}


@pytest.fixture(scope="module")
def folder(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("audited")
    run(config_of(model_dir, corpus_file, home, CHANGES))
    return home / "tiny"


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return audit_privacy(folder, PLAN)


def best(result: dict[str, Any], training: str, defence: str) -> dict[str, float]:
    (item,) = (
        m for m in result["membership"] if (m["training"], m["defence"]) == (training, defence)
    )
    found: dict[str, float] = max(item["attacks"].values(), key=lambda attack: attack["auc"])
    return found


def test_members_of_an_overfitted_update_are_told(result: dict[str, Any]) -> None:
    assert best(result, "overfit", "none")["low"] > 0.7


def test_noise_on_the_device_hides_them(result: dict[str, Any]) -> None:
    assert best(result, "overfit", "example_level")["low"] < 0.65
    undefended = best(result, "overfit", "none")["auc"]
    assert best(result, "overfit", "example_level")["auc"] < undefended - 0.1


def test_every_kind_of_update_is_attacked_behind_every_defence(result: dict[str, Any]) -> None:
    kinds = [(m["training"], m["defence"]) for m in result["membership"]]
    defences = ("none", "example_level", "secure_aggregation", "client_level")
    assert kinds == [
        *((training, d) for training in ("round", "overfit") for d in defences),
        ("tuned model", "run"),
    ]
    for item in result["membership"]:
        alone = item["defence"] in {"none", "example_level"}
        assert set(item["attacks"]) == {"loss", "gain", *(["others"] if alone else [])}
        assert (item["epsilon"] is not None) == (
            item["defence"] in {"example_level", "client_level"}
        )
    inverted = [(i["training"], i["defence"]) for i in result["inversion"]]
    assert inverted == [(training, d) for training in ("one step", "round") for d in defences]
    assert all(0 <= i["rouge_l"] <= i["rouge_1"] <= 1 for i in result["inversion"])
    assert all(i["num_texts"] == 2 for i in result["inversion"])


def test_the_folder_has_the_audit_and_a_report_of_it(folder: Path, result: dict[str, Any]) -> None:
    assert json.loads((folder / "privacy_audit.json").read_text()) == json.loads(json.dumps(result))
    report = (folder / "report.html").read_text()
    assert "What updates give away" in report
    assert "Few blocks, many steps" in report
    words = (folder / "privacy_audit.json").read_text()
    assert "both stay private" not in words  # the devices' text is not in it


def test_the_same_audit_is_not_made_again(
    folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    again = audit_privacy(folder, PLAN)
    assert again["wall_seconds"] == result["wall_seconds"]


def test_what_is_no_run_with_devices_is_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["audit-privacy", str(tmp_path / "none")])
    shown = capsys.readouterr().err
    assert shown.endswith("must be a run folder with a config.yaml, got no such folder\n")
    with pytest.raises(SystemExit):
        main(["audit-privacy", str(folder), "--num-devices", "1"])
    assert "--num-devices must be at least 2, got 1" in capsys.readouterr().err


def test_a_run_without_devices_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "config.yaml").read_text().replace("method: fedpeat", "method: centralized")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="method centralized has no devices"):
        audit_privacy(tmp_path, PLAN)
