"""What a run cost in its simulated world: sums by hand, and what is not known."""

from __future__ import annotations

import math
import re

import pytest

from fedpeat.report import load_run, render_report
from fedpeat.report.axes import joules_unit
from fedpeat.report.curves import curve_points
from fedpeat.report.quantities import joules_text
from report.report_files import (
    Line,
    MakeRun,
    figure,
    participant,
    round_line,
    summary,
    three_rounds,
)

TITLE = "What it cost in the simulated world"


def spent(seconds: float | None, joules: float | None, num_bytes: float | None) -> Line:
    return {"simulated": {"seconds": seconds, "joules": joules, "bytes": num_bytes}}


def rounds() -> list[Line]:
    return [
        round_line(0, 32.0, participants=[], simulated={}),
        round_line(1, 0.0, quality=None, **spent(60.0, 500.0, 1e6)),
        round_line(2, 16.0, **spent(180.0, 1500.0, 3e6)),
    ]


def test_costs_are_summed_over_rounds_without_evaluation(make_run: MakeRun) -> None:
    points = curve_points(load_run(make_run(rounds())))
    assert [point.simulated for point in points] == [(0, 0, 0), (240, 2000, 4e6)]


@pytest.mark.parametrize(
    ("caption", "axis", "last"),
    [
        ("Per simulated second", "simulated time [minutes]", "round 2, 4 min: 16.00"),
        ("Per simulated joule", "devices + server [kJ]", "round 2, 2.00 kJ: 16.00"),
        ("Per simulated byte", "down + up [MB]", "round 2, 4.0 MB: 16.00"),
    ],
)
def test_each_cost_has_its_chart_in_units_of_people(
    make_run: MakeRun, caption: str, axis: str, last: str
) -> None:
    chart = figure(render_report(load_run(make_run(rounds()))), caption)
    assert axis in chart
    assert re.findall(r"<circle[^>]*><title>(.*?)</title>", chart)[1] == last
    # from the left end of the axis to its right, downwards
    (x0, y0), (x1, y1) = re.findall(r'<circle cx="(\S+)" cy="(\S+)"', chart)
    assert (float(x0), float(x1)) == (46.0, 328.0)
    assert float(y0) < float(y1)


def test_the_section_tells_all_costs_even_of_rounds_not_evaluated(make_run: MakeRun) -> None:
    lines = [*rounds(), round_line(3, 0.0, quality=None, **spent(60.0, 1.0, 1e6))]
    assert "in all 5 min, 2.00 kJ and 5.0 MB." in render_report(load_run(make_run(lines)))


@pytest.mark.parametrize(
    "lines", [three_rounds(), [round_line(k, 30.0, simulated={}) for k in (0, 1)]]
)
def test_without_a_world_there_is_no_section(make_run: MakeRun, lines: list[Line]) -> None:
    assert TITLE not in render_report(load_run(make_run(lines)))


def test_what_is_unknown_ends_the_curve_and_is_told(make_run: MakeRun) -> None:
    lines = [*rounds(), round_line(3, 15.0, **spent(None, 10.0, math.nan)), round_line(4, 14.0)]
    page = render_report(load_run(make_run(lines)))
    assert "in all unknown time, unknown energy and unknown bytes." in page
    assert "Round 3 does not tell all that it cost" in page
    assert figure(page, "Per simulated second").count("<circle") == 2
    assert figure(page, "Per simulated joule").count("<circle") == 3
    assert "nan" not in page.split("</style>")[1].lower()


def test_nothing_spent_and_nothing_recorded_are_told_apart(make_run: MakeRun) -> None:
    lines = [
        round_line(0, 32.0, simulated={}),
        round_line(1, 30.0, simulated={"seconds": 4.0, "bytes": 0}),
    ]
    page = render_report(load_run(make_run(lines)))
    assert '<p class="empty">Nothing was spent.</p>' in figure(page, "Per simulated byte")
    assert '<p class="empty">Not recorded.</p>' in figure(page, "Per simulated joule")
    assert figure(page, "Per simulated second").count("<circle") == 2


def test_one_round_has_its_dot(make_run: MakeRun) -> None:
    page = render_report(load_run(make_run([round_line(1, 30.0, **spent(5.0, 10.0, 1e3))])))
    assert figure(page, "Per simulated second").count("<circle") == 1


def test_sixty_devices_change_no_cost(make_run: MakeRun) -> None:
    people = [participant(f"d{i}") for i in range(60)]
    lines = [round_line(1, 30.0, participants=people, **spent(5.0, 10.0, 1e3))]
    assert "in all 5.0 s, 10.0 J and 1.0 kB." in render_report(load_run(make_run(lines)))


def test_the_summary_tells_simulated_bytes_where_it_has_them(make_run: MakeRun) -> None:
    result = summary()
    result["cost"] |= {"simulated_seconds": 7500.0, "simulated_joules": 7246.98}
    old = render_report(load_run(make_run([], result, name="old")))
    assert "7.25 kJ" in old
    assert "Simulated bytes" not in old
    result["cost"]["simulated_bytes"] = 293_965_120.0
    assert "Simulated bytes</dt><dd>294 MB" in render_report(load_run(make_run([], result)))


@pytest.mark.parametrize(
    ("joules", "text"),
    [
        (0.0, "0 J"),
        (999.6, "1.00 kJ"),
        (4.018, "4.02 J"),
        (2.5e6, "2.50 MJ"),
        (None, "not measured"),
    ],
)
def test_energy_is_told_in_three_digits(joules: float, text: str) -> None:
    assert joules_text(joules) == text


def test_an_axis_of_energy_has_its_unit() -> None:
    assert [joules_unit(x).name for x in (2.0, 1e3, 5e6, 1e9)] == ["J", "kJ", "MJ", "GJ"]
