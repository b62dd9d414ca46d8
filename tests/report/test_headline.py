"""The sentence on top says what the run achieved, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeat.report import load_run
from fedpeat.report.headline import headline, remarks
from report.report_files import MakeRun, round_line, summary, three_rounds


def test_a_good_run_in_one_sentence(make_run: MakeRun) -> None:
    assert headline(load_run(make_run(three_rounds(), summary()))) == (
        "Plug-in perplexity 21.3, down from 34.9: 81 % of the gap to full tuning closed, "
        "with 6 devices that never held the whole model."
    )


@pytest.mark.parametrize(
    ("quality", "sentence"),
    [
        (
            {"gap_closed": None},
            "Plug-in perplexity 21.3, down from 34.9, "
            "with 6 devices that never held the whole model.",
        ),
        (
            {"plug_in": 18.0, "gap_closed": 1.18},
            "Plug-in perplexity 18.0, down from 34.9: better than full tuning "
            "(118 % of the gap closed), with 6 devices that never held the whole model.",
        ),
        (
            {"plug_in": 40.0, "gap_closed": -0.2},
            "Plug-in perplexity 40.0, up from 34.9: worse than the untouched model.",
        ),
        ({"plug_in": 34.9}, "Plug-in perplexity 34.9, unchanged by the tuning."),
        ({"plug_in": None}, "Plug-in perplexity is not finite: the tuning diverged."),
        ({"full_zero_shot": None}, "Plug-in perplexity 21.3."),
    ],
)
def test_other_ends_are_told_as_they_are(
    make_run: MakeRun, quality: dict[str, Any], sentence: str
) -> None:
    assert headline(load_run(make_run(three_rounds(), summary(**quality)))) == sentence


def test_higher_accuracy_is_better(make_run: MakeRun) -> None:
    quality = {"metric": "accuracy", "plug_in": 0.782, "full_zero_shot": 0.512}
    assert headline(load_run(make_run([], summary(**quality)))).startswith(
        "Plug-in accuracy 78.2 %, up from 51.2 %: 81 % of the gap"
    )


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ({"method": "fed_peft"}, "with 6 devices that held the full model."),
        ({"method": "local"}, "with 6 devices."),
        ({"num_clients": None}, "with devices that never held the whole model."),
        ({"method": "centralized"}, "with all data in one place."),
        ({"emulator": None}, "with 6 devices."),
        (
            {"emulator": {"num_parameters": 8_000_000}},
            "with 6 devices whose emulator is as large as the model.",
        ),
        ({"num_clients": 1}, "with 1 device that never held the whole model."),
    ],
)
def test_devices_never_held_the_model_only_where_that_is_so(
    make_run: MakeRun, change: dict[str, Any], end: str
) -> None:
    assert headline(load_run(make_run(three_rounds(), summary() | change))).endswith(end)


def test_a_run_without_tuning_says_so(make_run: MakeRun) -> None:
    untouched = summary(plug_in=34.9) | {"method": "zero_shot"}
    sentence = headline(load_run(make_run(three_rounds(), untouched)))
    assert sentence == "Zero-shot perplexity 34.9: nothing was tuned."


def test_the_upper_bound_does_not_boast_of_its_own_gap(make_run: MakeRun) -> None:
    bound = summary(plug_in=18.9, gap_closed=1.0) | {"method": "fed_peft"}
    assert "gap" not in headline(load_run(make_run(three_rounds(), bound)))


def test_a_run_without_summary_tells_how_far_it_came(make_run: MakeRun) -> None:
    assert headline(load_run(make_run(three_rounds()))) == (
        "Still running or interrupted after round 2: plug-in perplexity 22.0, down from 34.9."
    )


def test_a_run_without_rounds_is_before_its_first(make_run: MakeRun) -> None:
    assert headline(load_run(make_run())) == "Still running or interrupted before the first round."


def test_remarks_name_the_rounds_that_are_not_finite_and_the_warnings(make_run: MakeRun) -> None:
    lines = [*three_rounds(), round_line(3, None), round_line(4, 21.0, warnings=["slow disk"])]
    assert remarks(load_run(make_run(lines))) == [
        "Plug-in quality or training loss is not finite in round 3.",
        "Round 4: slow disk",
    ]
