"""Reading a run folder: what is taken, and the one clear line for each fault."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedpeat.core.errors import DataError
from fedpeat.report import load_run
from report.report_files import MakeRun, round_line, summary, three_rounds


def test_a_whole_run_is_read(make_run: MakeRun) -> None:
    run = load_run(make_run(three_rounds(), summary()))
    assert run.name == "demo"
    assert [record.plug_in for record in run.rounds] == [34.9, 28.0, 22.0]
    assert [item.client_id for item in run.rounds[1].participants] == ["server", "ann"]
    assert run.summary is not None
    assert run.summary.quality.plug_in == 21.3
    assert run.summary.cost.wall_seconds == 192.0


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: must be a run folder, got no such folder"):
        load_run(tmp_path / "nowhere")


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="must be a run folder, got a file"):
        load_run(tmp_path / "file")


def test_a_folder_without_files_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(DataError, match="config.yaml, metrics.jsonl, summary.json, got none"):
        load_run(tmp_path)


def test_a_broken_line_is_named_by_file_and_number(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:40], lines[2], ""]))
    with pytest.raises(
        DataError, match=r"metrics\.jsonl, line 2: broken JSON at character"
    ) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_a_cut_off_last_line_of_a_running_run_is_left_out_and_told(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-30])
    run = load_run(folder)
    assert run.last_round == 1
    assert "cut off" in run.notes[0]


def test_a_cut_off_last_line_of_a_finished_run_is_a_fault(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-30])
    with pytest.raises(DataError, match="line 3: broken JSON"):
        load_run(folder)


def test_another_encoding_is_named(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    (folder / "metrics.jsonl").write_bytes('{"reason": "zu spät"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="must be UTF-8 text"):
        load_run(folder)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_a_number_that_is_not_finite_stays_so(make_run: MakeRun, text: str) -> None:
    folder = make_run([round_line(0, None), round_line(1, None)])
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"train_loss": 3.0', f'"train_loss": {text}'))
    loss = load_run(folder).rounds[1].train_loss
    assert loss is not None
    assert not math.isfinite(loss)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, "", "[1, 2]", "null", "{"])
def test_hostile_json_is_a_data_error(make_run: MakeRun, text: str) -> None:
    folder = make_run(three_rounds())
    (folder / "summary.json").write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        load_run(folder)


def test_null_for_an_evaluated_plug_in_means_not_finite(make_run: MakeRun) -> None:
    run = load_run(make_run([round_line(0, 34.9), round_line(1, None)], summary(plug_in=None)))
    assert math.isnan(run.rounds[1].plug_in or 0.0)
    assert run.summary is not None
    assert math.isnan(run.summary.quality.plug_in or 0.0)


def test_null_for_full_tuned_means_not_measured(make_run: MakeRun) -> None:
    run = load_run(make_run(three_rounds(), summary(full_tuned=None)))
    assert run.summary is not None
    assert run.summary.quality.values["full_tuned"] is None


def test_a_round_without_quality_is_not_evaluated(make_run: MakeRun) -> None:
    run = load_run(make_run([round_line(0, 34.9), round_line(1, 1.0, quality=None)]))
    assert [record.is_evaluated for record in run.rounds] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"server_round": -1}, "line 1: server_round must be 0 or more, got -1"),
        ({"server_round": 1.5}, "server_round must be a whole number, 0 or more, got 1.5"),
        ({"train_loss": "low"}, "train_loss must be a number or null, got 'low'"),
        ({"train_loss": True}, "train_loss must be a number or null, got True"),
        ({"bytes_down": -5}, "bytes_down must be 0 or more, got -5"),
        ({"product_error": -0.1}, "product_error must be 0 or more, got -0.1"),
        ({"participants": {}}, "participants must be a list of objects, got {}"),
        ({"quality": {"metric": "f1"}}, "quality: metric must be one of perplexity, accuracy"),
        ({"warnings": "one"}, "warnings must be a list of texts, got 'one'"),
        (
            {"participants": [{"client_id": "ann", "role": "device", "status": "approved"}]},
            r"participants\[0\]: status must be one of accepted, rejected, dropped, late, failed",
        ),
    ],
)
def test_a_wrong_field_is_named_with_allowed_and_got(
    make_run: MakeRun, change: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_run(make_run([round_line(1, 30.0) | change]))


def test_another_schema_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(DataError, match=r"summary.json: schema must be 1, got 2"):
        load_run(make_run(three_rounds(), summary() | {"schema": 2}))


def test_two_metrics_in_one_run_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(DataError, match="must be the same throughout a run, got accuracy, perpl"):
        load_run(make_run(three_rounds(), summary(metric="accuracy")))


def test_of_a_round_written_twice_the_last_line_counts(make_run: MakeRun) -> None:
    lines = [round_line(0, 34.9), round_line(2, 9.0), round_line(1, 28.0), round_line(2, 22.0)]
    run = load_run(make_run(lines))
    assert [(record.server_round, record.plug_in) for record in run.rounds] == [
        (0, 34.9),
        (1, 28.0),
        (2, 22.0),
    ]


def test_the_upper_bound_is_the_reference(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    make_run([round_line(0, 34.9), round_line(1, 19.0)], name="demo/full_tuned")
    reference = load_run(folder).reference
    assert reference is not None
    assert reference.rounds[1].plug_in == 19.0


def test_an_empty_folder_of_the_upper_bound_is_no_reference(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    (folder / "full_tuned").mkdir()
    assert load_run(folder).reference is None


def test_a_config_of_another_encoding_does_not_cost_the_report(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    (folder / "config.yaml").write_bytes(b"name: caf\xe9\n")
    assert load_run(folder).config_text == "name: caf\ufffd\n"


def test_empty_metrics_are_a_run_before_its_first_round(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "metrics.jsonl").write_text("")
    assert load_run(folder).rounds == ()


def test_a_byte_order_mark_is_skipped(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    (folder / "summary.json").write_text(json.dumps(summary()), encoding="utf-8-sig")
    assert load_run(folder).summary is not None
