"""Methods against each other: means and intervals by hand, the same in HTML and Markdown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.errors import DataError
from fedpeat.report import comparison_markdown, render_comparison, write_comparison
from fedpeat.report.axes import nice_ticks, value_ticks
from fedpeat.report.intervals import estimate, t_quantile


def row(method: str, plug_in: list[float | None], **values: Any) -> dict[str, Any]:
    return {"method": method, "seeds": list(range(len(plug_in))), "plug_in": plug_in} | values


def comparison(*rows: dict[str, Any], metric: str = "perplexity") -> dict[str, Any]:
    return {"schema": 1, "metric": metric, "num_seeds": 3, "rows": list(rows)}


def student_cdf(t: float, degrees: int) -> float:
    """Simpson's rule over the density of Student's t."""
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    constant /= math.sqrt(degrees * math.pi)
    steps = 4000
    width = t / steps
    weights = [1 if k in {0, steps} else 2 + 2 * (k % 2) for k in range(steps + 1)]
    heights = [(1 + (k * width) ** 2 / degrees) ** (-(degrees + 1) / 2.0) for k in range(steps + 1)]
    area = width / 3 * math.fsum(w * h for w, h in zip(weights, heights, strict=True))
    return 0.5 + constant * area


@pytest.mark.parametrize("num_values", range(2, 31))
def test_the_table_of_t_is_the_quantile_of_its_density(num_values: int) -> None:
    assert student_cdf(t_quantile(num_values), num_values - 1) == pytest.approx(0.975, abs=3e-5)


def test_mean_and_interval_match_hand_calculation() -> None:
    found = estimate([1.0, None, 2.0, 3.0])
    assert found is not None
    # s = 1, n = 3, t = 4.303
    assert (found.mean, found.num_values) == (2.0, 3)
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))


def test_one_seed_has_no_interval() -> None:
    found = estimate([2.0])
    assert found is not None
    assert found.half_width is None


def test_a_seed_that_is_not_finite_is_not_averaged_away() -> None:
    found = estimate([1.0, math.nan])
    assert found is not None
    assert math.isnan(found.mean)


def test_the_markdown_table_has_means_and_intervals() -> None:
    data = comparison(
        row("fedpeat", [21.3, 21.5, 21.1], gap_closed=[0.81, 0.80, 0.82], bytes_down=[8e6] * 3),
        row("a|b <i>", [19.0, 19.2], gap_closed=[0.9, None], emulator_tuned=[None] * 2),
    )
    # s = 0.2, n = 3: 4.303 * 0.2 / sqrt(3) = 0.497; s = 0.1414, n = 2: 12.706 * 0.1 = 1.27
    assert comparison_markdown(data).splitlines()[:4] == [
        "| Method | Seeds | Plug-in (perplexity) | Gap closed | Down |",
        "|:--|--:|--:|--:|--:|",
        "| fedpeat | 3 | 21.30 \u00b1 0.50 | 81 % \u00b1 2.5 pp | 8.0 MB |",
        "| a\\|b &lt;i&gt; | 2 | 19.10 \u00b1 1.27 | 90 % | not measured |",
    ]


def test_null_for_a_plug_in_means_not_finite_and_for_others_not_measured() -> None:
    data = comparison(row("a", [20.0, None], gap_closed=[None, None], bits_per_byte=[1.2, 1.4]))
    # s = 0.1414, n = 2: 12.706 * 0.1 = 1.271
    assert "| a | 2 | not finite | 1.300 \u00b1 1.271 |" in comparison_markdown(data)


def test_accuracy_has_its_interval_in_points_and_its_best_at_the_top() -> None:
    rows = (row("low", [0.70, 0.72]), row("high", [0.80, 0.82]))
    data = comparison(*rows, metric="accuracy")
    # s = 0.01414, n = 2: 12.706 * 0.01 = 0.127
    assert "| high | 2 | 81.00 % \u00b1 12.7 pp |" in comparison_markdown(data)
    page = render_comparison(data, "x")
    assert "high has the highest mean accuracy of 2 methods: 81.0 %." in page


def test_the_page_is_written_next_to_the_data_and_escapes_it(tmp_path: Path) -> None:
    data = comparison(row("<script>alert(1)</script>", [20.0, 21.0], full_zero_shot=[34.9, 34.9]))
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    path = write_comparison(tmp_path)
    assert path == tmp_path / "comparison.html"
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; has the lowest mean perplexity: 20.5." in page


def test_the_chart_has_a_dot_per_seed_and_one_for_the_mean() -> None:
    page = render_comparison(comparison(row("a", [20.0, 21.0, 22.0]), row("b", [25.0])), "x")
    assert page.count('class="seed"') == 4
    assert page.count('class="mean"') == 2
    assert page.count('class="range"') == 1


def test_dots_stand_where_their_values_are() -> None:
    page = render_comparison(comparison(row("a", [20.0]), row("b", [25.0]), row("c", [30.0])), "x")
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)%" cy="\d+" r="4"', page)]
    assert places[1] == pytest.approx(50.0)
    assert places[0] + places[2] == pytest.approx(100.0)
    assert places == sorted(places)


@pytest.mark.parametrize("plug_in", [[math.nan], [None], []])
def test_a_comparison_without_a_finite_quality_has_a_page(plug_in: list[float | None]) -> None:
    page = render_comparison(comparison(row("a", plug_in)), "x")
    assert "No method has a finite plug-in quality yet." in page
    assert "nan" not in page.split("</style>")[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"schema": 1, "metric": "f1"}, "metric must be one of perplexity, accuracy, got 'f1'"),
        (
            comparison({"method": "a", "seeds": [0, 1], "plug_in": [20.0]}),
            r"rows\[0\]: plug_in must be one value per seed \(2\), got \[20.0\]",
        ),
        (comparison({"method": "a", "seeds": [0], "plug_in": 20.0}), "plug_in must be a list"),
    ],
)
def test_a_fault_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        comparison_markdown(data)


def test_an_absent_comparison_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"comparison\.json: cannot be read: No such file"):
        write_comparison(tmp_path)


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert nice_ticks(0.0, 20.0) == [0, 5, 10, 15, 20]
    assert nice_ticks(18.2, 36.1) == [20, 25, 30, 35]
    assert nice_ticks(0.0, 1.0, smallest_step=1.0) == [0, 1]


def test_a_wide_log_axis_has_powers_of_ten() -> None:
    assert value_ticks(20.0, 4e4, is_log=True) == [100, 1000, 10000]
