"""Where a run stands while it goes on: read once, whatever state the files are in."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.errors import DataError
from fedpeat.core.run_folder import write_atomically
from fedpeat.core.run_lock import take_lock
from fedpeat.report import load, watching
from fedpeat.report.standing import Standing
from fedpeat.report.watching import CUT_OFF, NO_METRICS, RunWatcher
from report.report_files import Line, MakeRun, participant, round_line, summary, three_rounds

CONFIG = "method: fedpeat\nmodel: {name: bundled}\nfederated: {num_rounds: 8}\n"


def watcher_of(folder: Path) -> RunWatcher:
    return RunWatcher(folder, min_interval_seconds=0.0)


def write(folder: Path, lines: Sequence[Line]) -> None:
    """Replace metrics.jsonl as a run does."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(folder / "metrics.jsonl", text)


def rounds_of(standing: Standing) -> list[int]:
    return [record.server_round for record in standing.run.rounds]


@pytest.mark.parametrize(
    ("files", "got"),
    [
        (None, "no such folder"),
        ([], "one of config.yaml, metrics.jsonl, summary.json, .lock, got none"),
    ],
)
def test_what_is_no_run_folder_is_refused(
    tmp_path: Path, files: list[str] | None, got: str
) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
    with pytest.raises(DataError, match=got):
        RunWatcher(folder)


def test_a_run_that_has_yet_to_write_its_first_line_says_so(tmp_path: Path) -> None:
    with take_lock(tmp_path):
        standing = watcher_of(tmp_path).standing()
    assert standing.run.notes == (NO_METRICS,)
    assert (standing.life, rounds_of(standing)) == ("running", [])


@pytest.mark.parametrize(
    ("lock_is", "is_done", "life"),
    [
        ("held", 0, "running"),
        ("held", 1, "running"),
        ("free", 1, "finished"),
        ("free", 0, "stopped"),
        ("missing", 1, "finished"),
        ("missing", 0, "unknown"),
    ],
)
def test_the_lock_and_the_summary_tell_whether_a_run_is_alive(
    make_run: MakeRun, lock_is: str, is_done: int, life: str
) -> None:
    folder = make_run(three_rounds(), summary() if is_done else None)
    with ExitStack() as stack:
        if lock_is != "missing":
            lock = stack.enter_context(take_lock(folder))
            if lock_is == "free":
                lock.close()
        assert watcher_of(folder).standing().life == life


def test_each_line_is_parsed_once_though_the_file_is_replaced_each_round(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = load.parse_round

    def counted(line: str, where: str) -> Any:
        parsed.append(where)
        return parse(line, where)

    monkeypatch.setattr(watching, "parse_round", counted)
    lines = [round_line(number, 30.0 - number) for number in range(6)]
    folder = make_run(lines[:1])
    watcher = watcher_of(folder)
    for count in range(1, 7):
        write(folder, lines[:count])
        assert rounds_of(watcher.standing()) == list(range(count))
        watcher.standing()
    assert parsed == [f"metrics.jsonl, line {number}" for number in range(1, 7)]


def test_a_resumed_run_is_read_anew(make_run: MakeRun) -> None:
    lines = [round_line(number, 30.0 - number) for number in range(6)]
    folder = make_run(lines)
    watcher = watcher_of(folder)
    watcher.standing()
    again = [*lines[:3], round_line(3, 11.0), round_line(4, 10.0)]
    write(folder, again)
    standing = watcher.standing()
    assert [record.plug_in for record in standing.run.rounds] == [30.0, 29.0, 28.0, 11.0, 10.0]
    assert standing.participants[1].num_drawn == 5


def test_reading_in_pieces_gives_what_reading_at_once_gives(make_run: MakeRun) -> None:
    rng = random.Random(0)  # noqa: S311 - a test's own choices
    names, statuses = ["ann", "bob", "eve"], ["accepted", "rejected", "late"]
    lines = [
        round_line(
            number,
            30.0 - number if rng.random() < 0.7 else None,
            participants=[
                participant(name, rng.choice(statuses), reason=rng.choice(["", "why"]), bytes_up=3)
                for name in rng.sample(names, 2)
            ],
            warnings=["w"] * rng.randrange(2),
        )
        for number in range(12)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    folder = make_run(lines[:1])
    watcher = watcher_of(folder)
    cuts = sorted(rng.sample(range(1, len(content)), 40))
    for cut in [*cuts, len(content)]:
        (folder / "metrics.jsonl").write_bytes(content[:cut])
        standing = watcher.standing()
    whole = watcher_of(folder).standing()
    assert json.dumps(standing.record()) == json.dumps(whole.record())
    assert rounds_of(whole) == list(range(12))


def test_a_half_written_last_line_is_told_and_counts_once_it_is_whole(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    line = json.dumps(round_line(3, 21.0))
    path = folder / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + line[:40])
    watcher = watcher_of(folder)
    assert watcher.standing().run.notes == (CUT_OFF,)
    assert rounds_of(watcher.standing()) == [0, 1, 2]
    path.write_text(before + line + "\n")
    assert watcher.standing().run.notes == ()
    assert rounds_of(watcher.standing()) == [0, 1, 2, 3]


def test_a_damaged_line_is_left_out_and_named(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    path = folder / "metrics.jsonl"
    first, second, third = path.read_text().splitlines()
    path.write_text("\n".join([first, second[:50], third, ""]))
    standing = watcher_of(folder).standing()
    assert rounds_of(standing) == [0, 2]
    assert standing.run.notes[0].startswith("Left out: metrics.jsonl, line 2: broken JSON")


def test_the_last_line_of_a_round_counts(make_run: MakeRun) -> None:
    folder = make_run([*three_rounds(), round_line(1, 27.0)])
    watcher = watcher_of(folder)
    standing = watcher.standing()
    assert [record.plug_in for record in standing.run.rounds] == [34.9, 27.0, 22.0]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(round_line(2, 20.0)) + "\n")
    assert watcher.standing().run.rounds[2].plug_in == 20.0


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
@pytest.mark.parametrize("content", ["{ [", "\ud800", "- " * 5000])
def test_another_damaged_file_costs_a_note_only(make_run: MakeRun, name: str, content: str) -> None:
    folder = make_run(three_rounds(), config=CONFIG)
    (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    standing = watcher_of(folder).standing()
    assert rounds_of(standing) == [0, 1, 2]
    assert len(standing.run.notes) == 1
    assert standing.run.notes[0].startswith("Left out: ")
    assert name in standing.run.notes[0]
    assert "\n" not in standing.run.notes[0]


def test_a_folder_that_goes_away_is_told(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    watcher = watcher_of(folder)
    assert rounds_of(watcher.standing()) == [0, 1, 2]
    shutil.rmtree(folder)
    standing = watcher.standing()
    assert standing.run.notes == (f"There is no folder {folder} at the moment.",)
    assert rounds_of(standing) == []


def test_a_folder_that_comes_later_is_waited_for_if_asked(
    make_run: MakeRun, tmp_path: Path
) -> None:
    watcher = RunWatcher(tmp_path / "demo", min_interval_seconds=0.0, must_be_run=False)
    assert watcher.standing().run.notes == (
        f"There is no folder {tmp_path / 'demo'} at the moment.",
    )
    make_run(three_rounds())
    assert rounds_of(watcher.standing()) == [0, 1, 2]


def test_files_are_looked_at_no_more_often_than_asked(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    watcher = RunWatcher(folder, min_interval_seconds=3600.0)
    first = watcher.standing()
    write(folder, [*three_rounds(), round_line(3, 20.0)])
    assert watcher.standing() is first


def test_the_settings_that_a_page_shows_are_read(make_run: MakeRun) -> None:
    standing = watcher_of(make_run(three_rounds(), config=CONFIG)).standing()
    assert (standing.method, standing.model, standing.num_rounds) == ("fedpeat", "bundled", 8)
    for config in ("- 1", "method: 3\nmodel: x\nfederated: {num_rounds: true}", ""):
        folder = make_run(three_rounds(), config=config, name=f"run-{len(config)}")
        other = watcher_of(folder).standing()
        assert (other.method, other.model, other.num_rounds) == ("", "", None)


def people() -> list[Line]:
    """Three rounds: ann is accepted, late, rejected; bob accepted, then not drawn."""
    told: Line = {"bytes_down": 10, "bytes_up": 4, "rung": "0.5", "num_examples": 7}
    return [
        round_line(0, 30.0, participants=[]),
        round_line(
            1,
            29.0,
            participants=[
                participant("server", last_loss=2.0),
                participant("ann", last_loss=3.0, **told),
                participant("bob", last_loss=2.5, **told),
            ],
        ),
        round_line(2, 28.0, participants=[participant("ann", "late", reason="slow", **told)]),
        round_line(
            3,
            27.0,
            participants=[participant("ann", "rejected", reason="NaN", **(told | {"rung": "1"}))],
            warnings=["carl sits out: no answer", "odd"],
        ),
    ]


def test_participants_are_added_up(make_run: MakeRun) -> None:
    standing = watcher_of(make_run(people())).standing()
    assert [item.client_id for item in standing.participants] == ["server", "ann", "bob"]
    ann, bob = standing.participants[1:]
    assert (ann.status, ann.reason, ann.rung, ann.server_round) == ("rejected", "NaN", "1", 3)
    assert (ann.last_seen_round, ann.num_drawn, ann.last_loss) == (3, 3, 3.0)
    assert dict(ann.statuses) == {"accepted": 1, "late": 1, "rejected": 1}
    assert (ann.bytes_down, ann.bytes_up, ann.num_examples) == (30.0, 12.0, 7.0)
    assert ann.recent == ((1, "accepted"), (2, "late"), (3, "rejected"))
    assert (bob.server_round, bob.last_seen_round, bob.num_drawn) == (1, 1, 1)
    assert standing.accepted == {0: (0, 0), 1: (3, 3), 2: (0, 1), 3: (0, 1)}


def test_one_who_never_answered_was_never_seen(make_run: MakeRun) -> None:
    lines = [round_line(n, 9.0, participants=[participant("ann", "dropped")]) for n in (1, 2)]
    standing = watcher_of(make_run(lines)).standing()
    assert standing.participants[0].last_seen_round is None


def test_warnings_and_faults_are_told_the_newest_first(make_run: MakeRun) -> None:
    standing = watcher_of(make_run(people())).standing()
    assert [(event.server_round, event.kind, event.text) for event in standing.events] == [
        (3, "warning", "odd"),
        (3, "warning", "carl sits out: no answer"),
        (3, "fault", "ann rejected: NaN"),
        (2, "fault", "ann late: slow"),
    ]
    assert standing.num_warnings == 2
    assert standing.sits_out == ("carl sits out: no answer",)


def test_those_set_aside_are_those_of_the_last_round(make_run: MakeRun) -> None:
    folder = make_run(
        [round_line(1, 9.0, set_aside=["a"]), round_line(2, 9.0, set_aside=["a", "b"])]
    )
    assert watcher_of(folder).standing().set_aside == ("a", "b")


def test_many_who_fail_alike_are_one_event(make_run: MakeRun) -> None:
    crowd = [participant(f"d{index}", "dropped") for index in range(30)]
    standing = watcher_of(make_run([round_line(1, 9.0, participants=crowd)])).standing()
    assert [event.text for event in standing.events] == ["d0, d1, d2, d3, d4 and 25 more dropped"]


def test_what_is_left_is_the_mean_of_the_last_five_rounds_for_each(make_run: MakeRun) -> None:
    seconds = [0.0, 100.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    lines = [round_line(n, 9.0, seconds=value) for n, value in enumerate(seconds)]
    folder = make_run(lines, config=CONFIG)
    with take_lock(folder):
        assert watcher_of(folder).standing().remaining_seconds == 12.0
    assert watcher_of(folder).standing().remaining_seconds is None


def test_runs_inside_the_run_are_told(make_run: MakeRun) -> None:
    folder = make_run(three_rounds())
    make_run([round_line(0, 9.0), round_line(1, 8.0)], name="demo/full_tuned")
    with take_lock(folder / "full_tuned"):
        standing = watcher_of(folder).standing()
    stages = standing.stages
    assert standing.run.reference is not None  # the curve beside the run's own
    assert [record.plug_in for record in standing.run.reference.rounds] == [9.0, 8.0]
    assert [(stage.name, stage.life, stage.last_round) for stage in stages] == [
        ("full_tuned", "running", 1)
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", ""),
        (b"half", ""),
        (b"one\n", "one"),
        (b"one\ntwo\nhal", "two"),
        (b"x" * 9000 + b"\nlast\n", "last"),
        (b"\xff\n", "\ufffd"),
    ],
)
def test_the_last_whole_line_of_the_log_tells_what_goes_on(
    make_run: MakeRun, content: bytes, line: str
) -> None:
    folder = make_run([])
    (folder / "log.txt").write_bytes(content)
    assert watcher_of(folder).standing().last_log == line


def test_the_record_is_strict_json_with_null_for_what_is_not_finite(make_run: MakeRun) -> None:
    folder = make_run([*three_rounds(), round_line(3, None, train_loss=math.nan)], config=CONFIG)
    record = watcher_of(folder).standing().record()
    told = json.loads(json.dumps(record, allow_nan=False))
    assert told["plug_in"] is None
    assert told["train_loss"] is None
    assert (told["schema"], told["server_round"], told["num_rounds"]) == (1, 3, 8)
    assert [line["plug_in"] for line in told["rounds"]] == [34.9, 28.0, 22.0, None]
    assert told["rounds"][1]["num_accepted"] == 2
