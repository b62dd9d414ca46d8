"""What Prometheus scrapes follows its text format, whatever devices call themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.run_lock import take_lock
from fedpeat.report.prometheus import exposition
from fedpeat.report.watching import RunWatcher
from report.report_files import MakeRun, participant, round_line, three_rounds

CONFIG = "method: fedpeat\nmodel: {name: bundled}\nfederated: {num_rounds: 8}\n"

Key = tuple[str, tuple[tuple[str, str], ...]]


def text_of(folder: Path) -> str:
    return exposition(RunWatcher(folder).standing())


def parsed(text: str) -> dict[Key, float]:
    """Return every sample, as the reference implementation of the format reads it."""
    parser: Any = pytest.importorskip(
        "prometheus_client.parser", reason="the parser of prometheus_client is the reference"
    )
    samples: dict[Key, float] = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in {"gauge", "counter"}, family.name
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in samples, "Prometheus refuses a scrape with a series twice"
            samples[key] = sample.value
    return samples


def test_a_scrape_is_what_the_format_says(make_run: MakeRun) -> None:
    people = [participant("ann", bytes_down=5, bytes_up=3.5)]
    lines = [round_line(0, 30.0, participants=[]), round_line(1, 28.5, participants=people)]
    lines[1] |= {"num_tokens": 64, "warnings": ["w", "dan sits out: no answer"]}
    folder = make_run(lines, config=CONFIG)
    with take_lock(folder):
        found = text_of(folder).split("\n")
    where = found.index("# TYPE fedpeat_plug_in gauge")
    assert found[where - 1 : where + 2] == [
        "# HELP fedpeat_plug_in Last known quality of the plug-in.",
        "# TYPE fedpeat_plug_in gauge",
        'fedpeat_plug_in{metric="perplexity"} 28.5',
    ]
    for line in (
        'fedpeat_run_info{name="demo",method="fedpeat",model="bundled",metric="perplexity"} 1',
        'fedpeat_run_state{state="running"} 1',
        'fedpeat_run_state{state="stopped"} 0',
        "fedpeat_run_rounds 8",
        "fedpeat_run_last_round 1",
        'fedpeat_bytes_total{direction="down"} 1000',
        'fedpeat_bytes_total{direction="up"} 500',
        'fedpeat_updates_total{status="accepted"} 1',
        "fedpeat_tokens_total 64",
        "fedpeat_warnings_total 2",
        "fedpeat_sits_out 1",
        'fedpeat_participant_bytes_total{client_id="ann",role="device",direction="up"} 3.5',
        'fedpeat_participant_last_seen_round{client_id="ann",role="device"} 1',
    ):
        assert line in found, line
    assert found[-1] == ""


def test_the_reference_parser_reads_every_sample(make_run: MakeRun) -> None:
    text = text_of(make_run(three_rounds(), config=CONFIG))
    samples = parsed(text)
    assert len(samples) == sum(not line.startswith("#") for line in text.splitlines())
    assert samples["fedpeat_plug_in", (("metric", "perplexity"),)] == 22.0
    assert samples["fedpeat_bytes_total", (("direction", "down"),)] == 2000.0
    key = ("fedpeat_participant_updates_total", ("client_id", "ann"), ("role", "device"))
    assert samples[key[0], (*key[1:], ("status", "accepted"))] == 2.0


HOSTILE = ['a"b', "a\\", "a\nfedpeat_plug_in 0", '"} 1\n# TYPE', "a\r\x00\u2028\ud800", "{}", ""]


def test_no_name_can_add_a_line_or_a_label(make_run: MakeRun) -> None:
    people = [participant(name, "late", reason=name) for name in HOSTILE]
    line = round_line(1, 28.0, participants=people, warnings=HOSTILE)
    samples = parsed(text_of(make_run([line], config=f"model: {{name: {HOSTILE[0]!r}}}")))
    names = {labels for name, labels in samples if name == "fedpeat_participant_updates_total"}
    assert {dict(labels)["client_id"] for labels in names} == {
        *HOSTILE[:4],
        "a\ufffd\ufffd\u2028\ufffd",
        "{}",
        "",
    }
    assert samples["fedpeat_plug_in", (("metric", "perplexity"),)] == 28.0


def test_of_names_that_are_the_same_once_cleaned_the_first_counts(make_run: MakeRun) -> None:
    people = [participant(f"a{sign}", bytes_up=3 + ord(sign)) for sign in "\x00\x01\x02"]
    text = text_of(make_run([round_line(1, 28.0, participants=people)]))
    labels = 'client_id="a\ufffd",role="device"'
    assert text.count(f"\nfedpeat_participant_last_seen_round{{{labels}}} 1\n") == 1
    samples = [line for line in text.splitlines() if f'{labels},direction="up"' in line]
    assert samples == [f'fedpeat_participant_bytes_total{{{labels},direction="up"}} 3']


def test_what_is_not_known_has_no_sample_and_what_diverged_is_nan(make_run: MakeRun) -> None:
    nothing = parsed(text_of(make_run([])))
    assert {name for name, _ in nothing}.isdisjoint(
        {"fedpeat_plug_in", "fedpeat_run_rounds", "fedpeat_run_last_round", "fedpeat_train_loss"}
    )
    diverged = parsed(text_of(make_run([round_line(1, None)], name="other")))
    assert math.isnan(diverged["fedpeat_plug_in", (("metric", "perplexity"),)])


def test_a_crowd_does_not_fill_the_store(make_run: MakeRun) -> None:
    people = [participant(f"d{index:04}") for index in range(1200)]
    text = text_of(make_run([round_line(1, 28.0, participants=people)]))
    assert text.count("\nfedpeat_participant_last_seen_round{") == 1000
    assert "\nfedpeat_participants 1200\n" in text
