"""Attacks on updates, end to end on a tiny model: they work where they must, defences tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fedpeat.adapter.tunable import attach
from fedpeat.cli.main import main
from fedpeat.config.schema import AdapterConfig, PrivacyAuditPlan
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.packing import PackedText
from fedpeat.experiments import privacy_audit as module
from fedpeat.experiments.privacy_audit import audit_privacy
from fedpeat.experiments.run import run
from fedpeat.experiments.updates import Seen, Training, Victim, seen_by_server
from fedpeat.model.blocks import find_blocks
from fedpeat.tuning.local import LocalSettings
from outcomes import config_of
from tiny import random_text, tiny_model

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


# --- text of which not every token counts ---------------------------------------------------------


@pytest.fixture(scope="module")
def with_prompts(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a run whose records are long prompts with short answers."""
    home = tmp_path_factory.mktemp("prompts")
    records = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    lines = [{**r, "asked": r["text"][:-12], "text": r["text"][-12:]} for r in records]
    (home / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {**CHANGES, "data": {"prompt_field": "asked"}}
    run(config_of(model_dir, home / "corpus.jsonl", home, changes))
    return home / "tiny"


def attacked(folder: Path, changed: Callable[[PackedText], PackedText]) -> list[PackedText]:
    """Return the texts that are read back, from blocks of the devices changed beforehand."""
    texts: list[PackedText] = []

    def noted(*args: Any) -> dict[str, list[Seen]]:
        texts.extend(victim.text for victim in args[2])
        return {}

    with (
        mock.patch.object(module, "_membership_of_updates", return_value=[]),
        mock.patch.object(module, "_membership_of_the_result", return_value=[]),
        mock.patch.object(module, "_text", lambda bench, name: changed(bench.data.clients[name])),
        mock.patch.object(module, "seen_by_server", noted),
        mock.patch.object(module, "privacy_verdicts", return_value=[]),
        mock.patch.object(module, "write_report"),
    ):
        audit_privacy(folder, PLAN, overwrite=True)
    return texts


def test_the_texts_that_are_read_back_are_those_that_count(with_prompts: Path) -> None:
    texts = attacked(with_prompts, lambda text: text)
    assert len(texts) == 2 * PLAN.num_texts  # one step, and a round
    for text in texts:
        assert text.input_ids.shape == (1, PLAN.inversion_tokens)
        assert text.loss_mask[0, 1:].sum() >= 3
    counts = np.array([0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1], bool)

    def one_place(text: PackedText) -> PackedText:
        mask, ids = np.tile(counts, (len(text.input_ids), 1)), np.arange(16, dtype=np.int32)
        return replace(text, loss_mask=mask, input_ids=np.tile(ids, (len(mask), 1)))

    for text in attacked(with_prompts, one_place):
        assert text.input_ids[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
        assert text.loss_mask[0].tolist() == counts[4:12].tolist()


def test_a_device_of_which_nothing_counts_is_named(with_prompts: Path) -> None:
    def nothing(text: PackedText) -> PackedText:
        mask = np.zeros_like(text.loss_mask)
        mask[:, 0] = True  # nothing comes before it
        mask[0, 1] = True
        return replace(text, loss_mask=mask)

    with pytest.raises(DataError, match="site-0 must have 2 blocks of text that count in the loss"):
        attacked(with_prompts, nothing)


def test_an_update_that_changes_nothing_is_clipped_to_nothing() -> None:
    model = tiny_model("llama", num_blocks=6)
    tunable = attach(model, find_blocks(model), [0, 5], AdapterConfig(r=2))
    text = random_text(num_blocks=4)
    silent = replace(text, loss_mask=np.zeros_like(text.loss_mask))
    training = Training(
        LocalSettings(batch_size=2, learning_rate=0.01), 1, 1.0, 1.0, 1.0, 0.5, 1e-5, 0
    )
    seen = seen_by_server(tunable, tunable.state(), [Victim("ann", silent, silent)], training)
    assert all((array == 0).all() for array in seen["none"][0].update.values())
    (noised,) = seen["client_level"]
    assert all(np.isfinite(array).all() and (array != 0).any() for array in noised.update.values())
