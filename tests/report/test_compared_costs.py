"""Methods in a simulated world: a line per run, read from the folders beside comparison.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedpeat.report import write_comparison
from fedpeat.report.compared_costs import load_compared
from report.report_files import MakeRun, figure, round_line, summary

TITLE = "In the simulated world"


def one_run(make_run: MakeRun, name: str, seconds: float, *, simulated: bool = True) -> Path:
    """A run of two rounds that costs so many simulated seconds, joules and kB."""
    cost = {"seconds": seconds / 2, "joules": seconds / 2, "bytes": 500 * seconds}
    own = {"simulated": cost if simulated else {}}
    lines = [round_line(0, 32.0, simulated={})]
    lines += [round_line(k, 32.0 - 6 * k, **own) for k in (1, 2)]
    result = summary()
    result["cost"] |= {"simulated_seconds": seconds, "simulated_joules": seconds}
    return make_run(lines, result, name=name)


def write(folder: Path, *methods: str, **values: Any) -> str:
    rows = [{"method": m, "seeds": [0, 1], "plug_in": [20.0, 21.0]} | values for m in methods]
    data = {"schema": 1, "metric": "perplexity", "rows": rows}
    (folder / "comparison.json").write_text(json.dumps(data))
    return write_comparison(folder).read_text(encoding="utf-8")


def test_each_seed_has_a_line_in_the_colour_of_its_method(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for name, seconds in (("a-seed0", 100.0), ("a-seed1", 50.0), ("b-seed0", 25.0)):
        one_run(make_run, name, seconds)
    one_run(make_run, "b-seed1", 100.0)
    page = write(tmp_path, "a", "b")
    for caption in ("Per simulated second", "Per simulated joule", "Per simulated byte"):
        chart = figure(page, caption)
        assert re.findall(r'class="line (m-\d) thin"', chart) == ["m-0", "m-0", "m-1", "m-1"]
        # 100, 50, 25, 100 of 100 on the axis from 46 to 328
        ends = re.findall(r'<circle cx="(\S+)" \S+ r="3" class="end', chart)
        assert [float(x) for x in ends] == [328.0, 187.0, 116.5, 328.0]
    assert "a, seed 1, round 2, 50.0 s: 20.00" in page
    assert "b, seed 0, round 2, 25.0 kB: 20.00" in page
    assert "Drawn:" not in page


def test_missing_and_damaged_folders_are_left_out_and_told(
    make_run: MakeRun, tmp_path: Path
) -> None:
    one_run(make_run, "a-seed0", 100.0)
    (one_run(make_run, "a-seed1", 100.0) / "summary.json").write_text("{")
    one_run(make_run, "b-seed0", 100.0, simulated=False)
    page = write(tmp_path, "a", "b")
    assert figure(page, "Per simulated second").count('class="end') == 1
    assert "Drawn: 1 of 4 runs" in page


def test_without_folders_or_worlds_there_is_no_section(make_run: MakeRun, tmp_path: Path) -> None:
    assert TITLE not in write(tmp_path, "a")
    one_run(make_run, "a-seed0", 100.0, simulated=False)
    assert TITLE not in write(tmp_path, "a")


def test_a_run_of_another_metric_is_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    quality = {"metric": "accuracy", "plug_in": 0.5}
    cost = {"seconds": 1.0, "joules": 1.0, "bytes": 1.0}
    make_run([round_line(1, 0.0, quality=quality, simulated=cost)], name="a-seed0")
    assert TITLE not in write(tmp_path, "a")


def test_the_table_has_costs_from_the_rows_or_else_from_the_runs(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for seed in (0, 1):
        one_run(make_run, f"a-seed{seed}", 100.0)
    page = write(tmp_path, "a")
    assert "Simulated time" in page
    assert '<td class="n">1 min 40 s</td><td class="n">100 J</td>' in page
    assert "Simulated bytes" not in page  # an older run does not tell
    page = write(tmp_path, "a", simulated_seconds=[7.0, 7.0], simulated_bytes=[2e6, 2e6])
    cells = '<td class="n">7.0 s</td><td class="n">100 J</td><td class="n">2.0 MB</td>'
    assert cells in page


@pytest.mark.parametrize("method", ["../a", "sub/a", "/a", "x\0a"])
def test_a_name_cannot_lead_out_of_the_folder(
    make_run: MakeRun, tmp_path: Path, method: str
) -> None:
    one_run(make_run, "a-seed0", 100.0)
    one_run(make_run, "here/sub/a-seed0", 100.0)
    assert load_compared(tmp_path / "here", method, 0.0) is None


@pytest.mark.parametrize("seed", [None, 0.5, float("nan"), float("inf")])
def test_a_seed_that_is_none_has_no_run(
    make_run: MakeRun, tmp_path: Path, seed: float | None
) -> None:
    one_run(make_run, "a-seed0", 100.0)
    assert load_compared(tmp_path, "a", seed) is None
    assert load_compared(tmp_path, "a", 0.0) is not None


def test_a_hostile_method_is_escaped_and_more_methods_than_colours_are_dashed(
    make_run: MakeRun, tmp_path: Path
) -> None:
    methods = [f"<b>{i}" for i in range(8)]
    for method in methods:
        one_run(make_run, f"{method}-seed0", 100.0)
    page = write(tmp_path, *methods)
    assert "<b>0" not in page
    assert "&lt;b&gt;0, seed 0" in page
    assert 'class="line m-0 dashed thin"' in page
    assert "m-6" not in page
