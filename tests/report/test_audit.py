"""The audit's part of the report, and emulators set side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.errors import DataError
from fedpeat.report import load_run, render_report
from fedpeat.report.pareto import Candidate, front, pareto_markdown, write_pareto
from report.report_files import MakeRun, summary, three_rounds
from report.test_page import HOSTILE, Page, text_of


def attack(*values: float | None, **more: Any) -> dict[str, Any]:
    curve = [{"num_tokens": 1000 * i, "perplexity": v} for i, v in enumerate(values)]
    return {"learning_rate": 3e-4, "curve": curve, "recovered_ratio": None} | more


def audited(recovered: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    emulator = {
        "name": "emulator",
        "recipe": "greedy:0.5",
        "verbatim": {"equal_ratio": 0.44, "near_ratio": 0.45, "near_distance": 0.05},
        "capability": {"full": 19.3, "emulator": 25.5, "random": 2085.0, "leaked_ratio": 0.94},
        "attacks": {
            "from_scratch": attack(2085.0, 1254.0),
            "fine_tune": attack(25.5, 24.0, recovered_ratio=recovered, regained_ratio=0.21),
            "reinsert": None,
        },
        "recovered_ratio": recovered,
        "verdicts": ["44 % of the parameters are there bit for bit."],
    }
    return {
        "schema": 1,
        "metric": "perplexity",
        "public_text": {"source": "server", "num_tokens": 5000},
        "held_out": {"source": "test split of the run", "num_tokens": 900},
        "emulators": [emulator | changes],
    }


def with_audit(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "audit.json").write_text(json.dumps(content))
    return folder


def test_the_report_tells_what_an_audit_found(make_run: MakeRun) -> None:
    folder = with_audit(make_run(three_rounds(), summary()), audited())
    page = Page(render_report(load_run(folder)))
    text = text_of(page)
    for part in (
        "What the emulator gives away",
        "44 % of the parameters are there bit for bit.",
        "an attacker with text of his own (server)",
        "1,254",
        "24.00",
        "90 %",
        "21 %",
    ):
        assert part in text, part
    assert "Missing blocks re-inserted" not in text
    assert page.count("mark") == 3 * 3 + 2 * 2  # rounds in three charts, and two attacks


def test_a_run_without_an_audit_has_no_such_part(make_run: MakeRun) -> None:
    page = render_report(load_run(make_run(three_rounds(), summary())))
    assert "What the emulator gives away" not in page


def test_what_was_measured_of_the_emulator_is_among_the_facts(make_run: MakeRun) -> None:
    result = summary()
    result["emulator"]["fidelity"] = {
        "hidden_cosine": 0.931,
        "gradient_cosine": 0.595,
        "gradient_cosine_block_0": 0.597,
        "gradient_cosine_block_11": 0.765,
    }
    text = text_of(Page(render_report(load_run(make_run([], result)))))
    for part in ("Hidden states, cosine", "0.931", "0.595", "0: 0.60, 11: 0.77"):
        assert part in text, part
    assert "Predictions, KL" not in text


@pytest.mark.parametrize("value", [None, 0.0, -1.0])
def test_a_quality_that_is_not_finite_is_told_and_not_drawn(
    make_run: MakeRun, value: float | None
) -> None:
    attacks = {"fine_tune": attack(25.5, value, recovered_ratio=None)}
    folder = with_audit(make_run([], summary()), audited(None, attacks=attacks))
    page = Page(render_report(load_run(folder)))
    assert page.count("mark") == 1


def test_no_text_of_an_audit_can_become_markup(make_run: MakeRun) -> None:
    content = audited(name=HOSTILE, recipe=HOSTILE, verdicts=[HOSTILE])
    content["emulators"] *= 2
    content["public_text"]["source"] = HOSTILE
    page = Page(render_report(load_run(with_audit(make_run([], summary()), content))))
    assert {"script", "img"} & {tag for tag, _ in page.tags} == set()
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))


def test_an_audit_of_another_schema_is_refused(make_run: MakeRun) -> None:
    folder = with_audit(make_run([], summary()), audited() | {"schema": 2})
    with pytest.raises(DataError, match=r"audit\.json: schema must be 1, got 2"):
        load_run(folder)


def candidate(name: str, recovered: float | None, plug_in: float | None) -> Candidate:
    return Candidate(name, "greedy:0.5", "perplexity", plug_in, None, None, recovered, None)


def test_the_front_worked_by_hand() -> None:
    kept = [candidate("c", 0.9, 17.0), candidate("a", 0.5, 20.0), candidate("b", 0.7, 18.0)]
    lost = [
        candidate("worse than b in both", 0.8, 19.0),
        candidate("as good as b, gives more away", 0.75, 18.0),
        candidate("gives away what b does, but is worse", 0.7, 18.5),
        candidate("not measured", None, 1.0),
        candidate("not finite", 0.1, float("nan")),
    ]
    assert [c.name for c in front([*lost, *kept])] == ["a", "b", "c"]
    twin = candidate("twin of b", 0.7, 18.0)
    assert {c.name for c in front([*kept, twin])} == {"a", "b", "c", "twin of b"}


def test_accuracy_is_better_the_higher() -> None:
    both = [
        Candidate(name, "", "accuracy", value, None, None, 0.5, None)
        for name, value in (("low", 0.6), ("high", 0.8))
    ]
    assert [c.name for c in front(both)] == ["high"]


def test_the_table_marks_the_front_and_cannot_be_broken_by_a_name() -> None:
    table = pareto_markdown([candidate("a|b", 0.5, 20.0), candidate("c", 0.6, 21.0)])
    lines = table.splitlines()
    assert lines[2].startswith("| **a\\|b** | greedy:0.5 | 20.00 |")
    assert lines[3].startswith("| c |")
    assert "50 % |" in lines[2]


def test_the_chart_has_a_dot_for_each_emulator_that_has_both_numbers(
    make_run: MakeRun, tmp_path: Path
) -> None:
    one = with_audit(make_run([], summary(plug_in=18.0), name="one"), audited(0.9))
    two = with_audit(make_run([], summary(plug_in=19.0), name="two"), audited(0.8))
    three = with_audit(make_run([], summary(plug_in=21.0), name="three"), audited(None))
    path = write_pareto([one, two, three], tmp_path)
    page = Page(path.read_text())
    assert page.count("mark") == 2
    assert page.count("result") == 2
    text = text_of(page)
    assert "one: plug-in 18.00, recovered 90 %" in text
    assert "three" in text
    assert (tmp_path / "audit.md").read_text().count("| **") == 2


def test_a_chart_of_nothing_to_draw_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    folder = with_audit(make_run([], summary()), audited(None))
    assert "No emulator has both numbers." in write_pareto([folder], tmp_path).read_text()


def test_a_run_that_was_not_audited_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must have an audit\.json, got none; fedpeat audit"):
        write_pareto([make_run([], summary())], tmp_path)


def test_runs_of_two_metrics_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    one = with_audit(make_run([], summary(), name="one"), audited())
    two = with_audit(make_run([], summary(metric="accuracy"), name="two"), audited())
    with pytest.raises(DataError, match="all runs must be measured by one metric"):
        write_pareto([one, two], tmp_path)
