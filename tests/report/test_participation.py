"""Who took part on which rung: a bar per accepted update, by height and shade."""

from __future__ import annotations

import re

import pytest

from fedpeat.report import load_run, render_report
from fedpeat.report.rungs import by_size, shade_of
from report.report_files import Line, MakeRun, participant, round_line


def grid(page: str) -> str:
    return page[page.index('<table class="who') : page.index("Totals per participant")]


def bars(page: str) -> list[tuple[float, str]]:
    """Height and shade of each bar."""
    found = re.findall(r'd="M\S+ \S+v-(\S+)h\S+z" class="s-accepted r-(\d)"', page)
    return [(float(height), shade) for height, shade in found]


def on(rung: str, name: str, status: str = "accepted") -> Line:
    return participant(name, status, rung=rung)


def test_the_larger_the_rung_the_higher_and_stronger_its_bar(make_run: MakeRun) -> None:
    people = [on("0.5", "a"), on("0.75", "b"), on("0.25", "c"), participant("server")]
    page = render_report(load_run(make_run([round_line(1, 30.0, participants=people)])))
    (half, one), (whole, zero), (quarter, two) = bars(grid(page))
    assert (zero, one, two) == ("0", "1", "2")
    # side 0.68 * 22; the smallest has 0.4 of it
    assert (whole, half, quarter) == pytest.approx((15.0, 10.5, 6.0), abs=0.06)
    # who has no rung has no shade of one
    assert grid(page).count("s-accepted r-none") == 1
    assert re.findall(r"on rung ([\d.]+)", page) == ["0.75", "0.5", "0.25"]


def test_what_did_not_count_keeps_its_own_mark(make_run: MakeRun) -> None:
    lost = [on("0.5", name, name) for name in ("dropped", "late", "rejected", "failed")]
    lines = [round_line(1, 30.0, participants=[on("0.75", "a"), *lost])]
    page = grid(render_report(load_run(make_run(lines))))
    assert bars(page) == [(15.0, "0")]
    assert "round 1: dropped, rung 0.5" in page
    for status in ("dropped", "late", "rejected", "failed"):
        assert f'class="s-{status}"' in page


def test_where_all_hold_the_same_rung_nothing_tells_rungs(make_run: MakeRun) -> None:
    lines = [round_line(1, 30.0, participants=[on("0.75", "a"), participant("server")])]
    page = render_report(load_run(make_run(lines)))
    assert bars(page) == []
    assert "r-none" not in page.split("</style>")[1]
    assert "on rung" not in page


def test_sixty_devices_have_low_rows_and_narrow_cells(make_run: MakeRun) -> None:
    people = [on(("0.5", "0.75")[i % 2], f"d{i}") for i in range(60)]
    lines = [round_line(k, 30.0, participants=people) for k in range(1, 3)]
    page = grid(render_report(load_run(make_run(lines))))
    assert page.startswith('<table class="who many">')
    assert len(bars(page)) == 120
    assert set(re.findall(r'<svg width="(\S+)" height="15"', page)) == {"30"}


def test_more_rungs_than_shades_share_them_in_order() -> None:
    assert [shade_of(i, 3) for i in range(3)] == ["r-0", "r-1", "r-2"]
    assert [shade_of(i, 8) for i in range(8)] == [f"r-{i // 2}" for i in range(8)]


def test_hundreds_of_rungs_do_not_flood_the_legend(make_run: MakeRun) -> None:
    people = [on(str(i / 200), f"d{i}") for i in range(200)]
    page = render_report(load_run(make_run([round_line(1, 30.0, participants=people)])))
    assert page.count("on rung ") == 12
    assert "and 188 more rungs" in page


def test_rungs_are_ordered_by_their_share_and_other_names_stay_behind() -> None:
    assert by_size(["inf", "a", "0.25", "nan", "1"]) == ["1", "0.25", "inf", "a", "nan"]


def test_a_rung_cannot_become_markup(make_run: MakeRun) -> None:
    people = [on("<img src=x>", "a"), on("0.5", "<b>")]
    page = render_report(load_run(make_run([round_line(1, 30.0, participants=people)])))
    assert "<img" not in page
    assert "<b>" not in grid(page)
    assert "on rung &lt;img src=x&gt;" in page
