"""What controller.json tells: training, returns, habits; a damaged one costs only its section."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedpeat.report import load_run, render_report
from fedpeat.report.records import Learning
from fedpeat.report.training import learning_steps
from report.report_files import MakeRun, figure, summary, three_rounds

NAN = math.nan
TRAINED, LEARNT = "How the controllers were trained", "What the policy has learnt"


def habit(*centers: float) -> dict[str, Any]:
    num = len(centers)
    return {
        "centers": list(centers),
        "takes_part": [i / max(1, num - 1) for i in range(num)],
        "rung": {"0.5": [0.25] * num, "0.75": [0.75] * num},
        "local_steps": {"2": [0.5] * num, "16": [0.5] * num},
    }


def curve(*returns: float | None) -> list[dict[str, float | None]]:
    return [{"num_steps": 100 * (i + 1), "mean_return": r} for i, r in enumerate(returns)]


FACTS: dict[str, Any] = {
    "seconds": {"sabppo": 9.4},
    "curves": [curve(0.0, 1.0), curve(2.0, 3.0), curve(1.0, 5.0)],
    "returns": {
        "random": {"mean": -1.0, "half_width": 0.5},
        "sabppo": {"mean": 2.0, "half_width": 0.25},
        "tuned_fixed": {"mean": 1.0, "half_width": 0.0},
    },
    "habits": {"snr_up_db": habit(-5.0, 5.0, 15.0), "free_memory_gb": habit(2.0, 4.0, 8.0)},
}


def page_with(make_run: MakeRun, content: object = None, **facts: Any) -> str:
    """Return the page of a run with a controller.json; a text is written as it is."""
    folder = make_run(three_rounds(), summary())
    record = {"schema": 1, "rungs": ["0.75", "0.5"], "plans": {}, "facts": FACTS | facts}
    text = content if isinstance(content, str) else json.dumps(content or record)
    (folder / "controller.json").write_text(text)
    page = render_report(load_run(folder))
    assert not re.search(r"\b(nan|inf)\b", page.split("</style>")[1], re.IGNORECASE)
    return page


def pixels(d: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)]


def test_a_run_without_a_controller_has_no_section(make_run: MakeRun) -> None:
    page = render_report(load_run(make_run(three_rounds(), summary())))
    assert TRAINED not in page
    assert LEARNT not in page


def test_steps_are_mean_lowest_and_highest_of_the_policies() -> None:
    curves = [Learning((1.0, 2.0), (0.0, 4.0)), Learning((1.0, 2.0), (1.0, 2.0))]
    assert learning_steps(curves) == [(1.0, 0.5, 0.0, 1.0), (2.0, 3.0, 2.0, 4.0)]


def test_a_step_that_a_policy_lacks_is_not_averaged_over_the_rest() -> None:
    curves = [Learning((1.0, 2.0), (0.0, NAN)), Learning((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))]
    assert learning_steps(curves) == [(1.0, 0.5, 0.0, 1.0), None, None]


def test_a_policy_without_any_return_is_left_out() -> None:
    curves = [Learning((1.0,), (None,)), Learning((1.0,), (2.0,))]
    assert learning_steps(curves) == [(1.0, 2.0, 2.0, 2.0)]


def test_the_training_chart_has_mean_band_and_both_levels(make_run: MakeRun) -> None:
    chart = figure(page_with(make_run), "Return while the policy was trained")
    line = re.findall(r'd="([^"]+)" class="line plug"', chart)[0]
    band = re.findall(r'd="([^"]+)" class="band"', chart)[0]
    (x0, y0), (x1, y1) = pixels(line)
    top0, top1, low1, low0 = pixels(band)
    assert (top0[0], top1[0], low1[0], low0[0]) == (x0, x1, x1, x0)
    # means 1 and 3, bands 0 to 2 and 1 to 5: in one linear scale
    assert (low0[1] - y0) == pytest.approx(y0 - top0[1], abs=0.2)
    assert (low1[1] - y1) == pytest.approx(y1 - top1[1], abs=0.2)
    assert (y0 - y1) == pytest.approx(low1[1] - y1, abs=0.2)
    levels = {
        t: float(y) for y, t in re.findall(r"M\S+ (\S+)H\S+ class=\S+ \w+\"><title>(\w+)<", chart)
    }
    assert levels["tuned_fixed"] == pytest.approx(y0, abs=0.2)
    assert levels["random"] > low0[1]
    assert "mean of 3 policies, 3.00 at the end" in chart
    assert "lowest to highest of them" in chart
    assert "tuned_fixed, 1.00" in chart


def test_one_policy_has_no_band(make_run: MakeRun) -> None:
    chart = figure(page_with(make_run, curves=[curve(0.0, 1.0)]), "Return while")
    assert "band" not in chart
    assert "one policy, 1.00 at the end" in chart


def test_a_missing_return_breaks_the_line_and_a_lone_one_is_a_dot(make_run: MakeRun) -> None:
    curves = [curve(NAN, 1.0, 2.0, None, 3.0)]
    chart = figure(page_with(make_run, curves=curves), "Return while")
    assert [d.count("L") for d in re.findall(r'd="([^"]+)" class="line plug"', chart)] == [1, 0]
    assert chart.count("<circle") == 1


def test_a_level_far_away_does_not_squeeze_the_curve(make_run: MakeRun) -> None:
    returns = FACTS["returns"] | {"random": {"mean": -500.0, "half_width": 1.0}}
    chart = figure(page_with(make_run, returns=returns), "Return while")
    assert "random, -500, off the chart" in chart
    assert "<title>random</title>" not in chart


def test_controllers_are_sorted_by_their_mean(make_run: MakeRun) -> None:
    chart = figure(page_with(make_run), "Return of each controller")
    assert re.findall(r"</title>(\w+)</text>", chart) == ["sabppo", "tuned_fixed", "random"]
    (x0, y0), (x1, y1), (x2, y2) = re.findall(r'<circle cx="(\S+)" cy="(\S+)"', chart)
    assert float(y0) < float(y1) < float(y2)
    # 2, 1 and -1 on a linear scale
    assert float(x1) - float(x2) == pytest.approx(2 * (float(x0) - float(x1)), abs=0.1)
    ends = re.findall(r'd="M(\S+) \S+H(\S+)" class="line plug"', chart)
    middle = [(float(a) + float(b)) / 2 for a, b in ends]
    assert middle == pytest.approx([float(x0), float(x2)], abs=0.1)  # none of width 0
    assert "2.00 \u00b1 0.25" in chart
    assert "sabppo: 2.00 \u00b1 0.25, 9.4 s to train" in chart


def test_a_return_that_is_not_finite_is_told_last_and_not_drawn(make_run: MakeRun) -> None:
    returns = {
        "broken": {"mean": None},
        "wild": {"mean": 1e308, "half_width": 1e308},
        "a": {"mean": 1.0, "half_width": NAN},
    }
    chart = figure(page_with(make_run, returns=returns), "Return of each controller")
    assert re.findall(r"</title>(\w+)</text>", chart) == ["a", "broken", "wild"]
    assert chart.count("<circle") == 1
    assert chart.count("not finite</text>") == 2


def test_hundreds_of_controllers_are_cut_and_told(make_run: MakeRun) -> None:
    returns = {f"k{i}": {"mean": float(i), "half_width": 1.0} for i in range(300)}
    chart = figure(page_with(make_run, returns=returns), "Return of each controller")
    assert "(the best 20 of 300)" in chart
    assert chart.count("<circle") == 20


def test_the_chance_to_take_part_is_drawn_by_snr_and_memory(make_run: MakeRun) -> None:
    page = page_with(make_run)
    charts = page[page.index(LEARNT) :].split("<h3>")
    uplink, memory = (next(c for c in charts if c.startswith(n)) for n in ("By the up", "By mem"))
    for chart, axis, unit in (
        (uplink, "uplink SNR [dB]", "dB"),
        (memory, "free memory [GB]", "GB"),
    ):
        own = figure(chart, "Takes part: 0 % to 100 %")
        assert axis in own
        assert f"{unit}: 50 %</title>" in own
    dots = re.findall(r'<circle cx="(\S+)" cy="(\S+)"', figure(uplink, "Takes part"))
    assert dots == [("46", "156"), ("187", "83"), ("328", "10")]
    # 2, 4 and 8 GB: a third of the way
    assert re.findall(r'<circle cx="(\S+)"', figure(memory, "Takes part"))[1] == "140"


def test_rungs_are_stacked_the_largest_at_the_bottom(make_run: MakeRun) -> None:
    page = page_with(make_run)
    chart = figure(page[page.index(LEARNT) :], "Which rung")
    (whole, first), (half, second) = re.findall(r'd="(\S[^"]+)" class="area (r-\d)"', chart)
    assert (first, second) == ("r-0", "r-1")
    # 0 % is at 156, 100 % at 10: from 0 to 75 %, from there to 100 %
    assert [y for _, y in pixels(whole)] == pytest.approx([46.5] * 3 + [156.0] * 3)
    assert [y for _, y in pixels(half)] == pytest.approx([10.0] * 3 + [46.5] * 3)
    legend = re.findall(r"</svg>((?:rung|local steps) \S+?)</li>", page)
    assert legend == ["rung 0.75", "rung 0.5", "local steps 16", "local steps 2"]


def test_a_bin_without_a_number_breaks_the_areas(make_run: MakeRun) -> None:
    odd = habit(1.0, 2.0, 3.0, 4.0)
    odd["takes_part"][1] = 1.5
    odd["rung"]["0.5"][2] = None
    page = page_with(make_run, habits={"snr_up_db": odd})
    assert figure(page, "Takes part").count("<circle") == 3
    areas = re.findall(r'class="area', figure(page, "Which rung"))
    assert len(areas) == 4  # two rungs, before and behind
    assert "By memory" not in page


@pytest.mark.parametrize("centers", [(3.0,), (3.0, 3.0), (NAN, 3.0), ()])
def test_few_or_equal_bins_have_a_chart(make_run: MakeRun, centers: tuple[float, ...]) -> None:
    page = page_with(make_run, habits={"free_memory_gb": habit(*centers)})
    if centers:
        assert figure(page, "Takes part").count("<circle") == sum(map(math.isfinite, centers))
    else:
        assert "Nothing was recorded." in page


def test_a_lone_bin_has_some_width(make_run: MakeRun) -> None:
    page = page_with(make_run, habits={"snr_up_db": habit(3.0)})
    outlines = re.findall(r'd="(\S[^"]+)" class="area', figure(page, "Which rung"))
    assert [len({x for x, _ in pixels(outline)}) for outline in outlines] == [2, 2]


def test_chances_beyond_a_whole_do_not_leave_the_chart(make_run: MakeRun) -> None:
    much = habit(1.0, 2.0) | {"rung": {"1": [0.9] * 2, "0.5": [0.9] * 2}}
    page = page_with(make_run, habits={"snr_up_db": much})
    outlines = re.findall(r'd="(\S[^"]+)" class="area', figure(page, "Which rung"))
    assert min(y for outline in outlines for _, y in pixels(outline)) == 10.0


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"schema": 1, "facts": {"cur', "controller.json: broken JSON at character"),
        ({"schema": 2, "facts": FACTS}, "controller.json: schema must be 1, got 2"),
        ("[]", "controller.json: must be a JSON object"),
        ({"schema": 1, "facts": {"curves": {"a": 1}}}, "curves must be a list of lists"),
        ({"schema": 1, "facts": {"curves": [[1]]}}, "must be a list of objects"),
        ({"schema": 1, "facts": {"returns": {"a": "b"}}}, "a must be an object or null"),
        (
            {"schema": 1, "facts": {"habits": {"snr_up_db": habit(1.0) | {"takes_part": [1, 0]}}}},
            "takes_part must be one probability per center (1)",
        ),
    ],
)
def test_a_damaged_file_costs_one_line_and_not_the_page(
    make_run: MakeRun, content: object, fault: str
) -> None:
    page = page_with(make_run, content)
    told = re.findall(r'<p class="empty">(Not shown.*?)</p>', page)
    assert len(told) == 1
    assert fault in told[0]
    assert LEARNT not in page
    assert "Plug-in perplexity 21.3" in page


def test_a_file_without_facts_says_so(make_run: MakeRun) -> None:
    page = page_with(make_run, {"schema": 1, "rungs": [], "plans": {}})
    assert "controller.json does not tell how it was trained." in page
    assert LEARNT not in page


def test_returns_without_curves_are_shown(make_run: MakeRun) -> None:
    page = page_with(make_run, curves=[])
    assert "No return of a policy was recorded while it was trained." in page
    assert figure(page, "Return of each controller").count("<circle") == 3


def test_no_name_can_become_markup(make_run: MakeRun) -> None:
    hostile = "<script>alert(1)</script>"
    facts = copy.deepcopy(FACTS)
    facts["returns"][hostile] = {"mean": 1.0, "half_width": 1.0}
    facts["habits"]["snr_up_db"]["rung"][hostile] = [0.0] * 3
    page = page_with(make_run, {"schema": 1, "facts": facts})
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 2


def test_ids_of_all_charts_are_unique(make_run: MakeRun) -> None:
    ids = re.findall(r' id="([^"]+)"', page_with(make_run))
    named = " ".join(re.findall(r'aria-labelledby="([^"]+)"', page_with_again(make_run))).split()
    assert len(ids) == len(set(ids))
    assert set(named) == set(ids)


def page_with_again(make_run: MakeRun) -> str:
    folder: Path = make_run(three_rounds(), summary(), name="again")
    (folder / "controller.json").write_text(json.dumps({"schema": 1, "facts": FACTS}))
    return render_report(load_run(folder))
