"""The audit of updates in the report: every attack told, faults named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.errors import DataError
from fedpeat.report import load_run, render_report
from report.report_files import MakeRun, summary, three_rounds

AUDIT: dict[str, Any] = {
    "schema": 1,
    "num_devices": 4,
    "membership": [
        {
            "training": "overfit",
            "defence": "none",
            "epsilon": None,
            "num_members": 32,
            "num_others": 128,
            "attacks": {"gain": {"auc": 0.987, "low": 0.95, "high": 1.0, "tpr": 0.75}},
        },
        {
            "training": "round",
            "defence": "client_level",
            "epsilon": 4.73,
            "num_members": 100,
            "num_others": 128,
            "attacks": {"loss": {"auc": 0.512, "low": 0.44, "high": 0.58, "tpr": 0.02}},
        },
    ],
    "inversion": [
        {
            "training": "one step",
            "defence": "secure_aggregation",
            "epsilon": None,
            "num_texts": 4,
            "rouge_1": 0.61,
            "rouge_l": 0.57,
            "baseline_rouge_1": 0.13,
            "baseline_rouge_l": 0.11,
        }
    ],
}


def audited(make_run: MakeRun, **changes: Any) -> Path:
    folder = make_run(three_rounds(), summary())
    (folder / "privacy_audit.json").write_text(json.dumps({**AUDIT, **changes}))
    return folder


def test_every_attack_has_a_row_with_its_interval_and_epsilon(make_run: MakeRun) -> None:
    page = render_report(load_run(audited(make_run)))
    assert "What updates give away" in page
    for text in (
        "0.99 [0.95, 1.0]",
        "32 and 128",
        "Few blocks, many steps",
        "Clipped sum with noise",
        "4.73",
        "0.51 [0.44, 0.58]",
        "Only the sum is seen",
        "0.61",
        "0.57",
        "0.13, 0.11",
    ):
        assert text in page, text


def test_a_run_that_was_not_audited_has_no_such_section(make_run: MakeRun) -> None:
    page = render_report(load_run(make_run(three_rounds(), summary())))
    assert "What updates give away" not in page


def test_a_form_that_is_unknown_is_a_named_fault(make_run: MakeRun) -> None:
    with pytest.raises(DataError, match="schema must be 1, got 2"):
        load_run(audited(make_run, schema=2))


def test_a_defence_that_is_unknown_is_a_named_fault(make_run: MakeRun) -> None:
    wrong = [{**AUDIT["membership"][0], "defence": "hope"}]
    with pytest.raises(DataError, match=r"privacy_audit.json.*defence must be one of none, .*hope"):
        load_run(audited(make_run, membership=wrong))


def test_what_a_run_promises_is_among_its_facts(make_run: MakeRun) -> None:
    promise = {"epsilon": 3.21, "noise_multiplier": 1.25, "clip_norm": 0.5}
    privacy = {
        "delta": 1e-5,
        "noise": "seed",
        "example": {**promise, "unit": "block of text", "noise_multiplier": None},
        "client": {**promise, "epsilon": 7.65, "sample_rate": 0.25},
    }
    page = render_report(load_run(make_run(three_rounds(), {**summary(), "privacy": privacy})))
    for text in (
        "Epsilon of a block of text",
        "3.21",
        "by device",
        "Epsilon of a device",
        "7.65",
        "with chance 0.25",
        "for experiments alone",
    ):
        assert text in page, text
