"""The page: whole, safe whatever the files say, readable without colour, made of nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedpeat.core.errors import StorageError
from fedpeat.report import load_run, render_report, write_report
from fedpeat.report.curves import curve_points
from fedpeat.report.markup import element
from fedpeat.report.style import STYLE
from report.report_files import Line, MakeRun, participant, round_line, summary, three_rounds


class Page(HTMLParser):
    """Collects tags, attributes and texts, and insists that every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def count(self, style: str) -> int:
        """Number of elements of a class outside the legend."""
        return sum(style in (attributes.get("class") or "").split() for _, attributes in self.tags)


def rendered(folder: Path) -> Page:
    return Page(render_report(load_run(folder)))


def text_of(page: Page) -> str:
    return " ".join(page.texts)


def test_the_report_is_written_into_the_run_folder(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    path = write_report(folder)
    assert path == folder / "report.html"
    assert "<h1>Plug-in perplexity 21.3" in path.read_text(encoding="utf-8")
    assert sorted(item.name for item in folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_a_report_that_cannot_be_written_leaves_nothing_behind(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    (folder / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html: cannot be written"):
        write_report(folder)
    assert list(folder.glob(".report*")) == []


def test_the_page_loads_and_runs_nothing(make_run: MakeRun) -> None:
    page = rendered(make_run(three_rounds(), summary()))
    names = {tag for tag, _ in page.tags}
    attributes = {name for _, found in page.tags for name in found}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "a", "form"})
    assert attributes.isdisjoint({"src", "href", "style", "xlink:href"})
    assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policies = [found for _, found in page.tags if found.get("http-equiv")]
    assert policies[0]["content"] is not None
    assert policies[0]["content"].startswith("default-src 'none'")


HOSTILE = "<script>alert(1)</script>\"' onload=x <img src=x onerror=alert(1)> \u202e\ud800\x00"


def test_no_text_of_a_file_can_become_markup(make_run: MakeRun) -> None:
    people = [
        participant(HOSTILE, "rejected", reason=HOSTILE),
        participant("server", "late", reason=HOSTILE),
    ]
    result = summary() | {"model": HOSTILE, "method": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    result["emulator"]["recipe"] = HOSTILE
    result["adapter"]["peft"] = HOSTILE
    lines = [round_line(0, 34.9), round_line(1, 28.0, participants=people, warnings=[HOSTILE])]
    config = "a: </pre>" + HOSTILE.replace("\ud800", "")
    folder = make_run(lines, result, config=config, name="<b onclick=x>")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert {"script", "img", "b"} & {tag for tag, found in page.tags if found} == set()
    assert not [found for _, found in page.tags if "onload" in found or "onclick" in found]
    assert text_of(page).count("<script>alert(1)</script>") >= 8
    assert not re.search("[\x00\u202e\ud800]", text_of(page))


def test_an_attribute_is_escaped() -> None:
    assert element("p", class_='x" onload="y') == '<p class="x&quot; onload=&quot;y"></p>'


def test_a_plain_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "1 < 2", element("b", "&")) == "<p>1 &lt; 2<b>&amp;</b></p>"


def test_the_key_figures_are_there(make_run: MakeRun) -> None:
    text = text_of(rendered(make_run(three_rounds(), summary())))
    for figure in ("81 %", "21.30", "25 %", "2.0 MB", "1.2 MB down, 800 kB up", "3 min 12 s"):
        assert figure in text


def test_a_missing_quality_is_not_measured(make_run: MakeRun) -> None:
    whole = text_of(rendered(make_run(three_rounds(), summary())))
    part = rendered(make_run(three_rounds(), summary(full_tuned=None, gap_closed=None), name="b"))
    assert text_of(part).count("not measured") == whole.count("not measured") + 2


def test_bits_per_byte_have_a_column_where_they_were_measured(make_run: MakeRun) -> None:
    without = rendered(make_run(three_rounds(), summary()))
    bits = {"full_zero_shot": 1.6543, "plug_in": 1.4217}
    with_bits = text_of(rendered(make_run([], summary(bits_per_byte=bits), name="b")))
    assert "1.654" in with_bits
    assert "1.422" in with_bits
    heads = [text for text in without.texts if text == "Bits per byte"]
    assert len(heads) == 1  # the glossary's


@pytest.mark.parametrize(
    ("quality", "verdicts"),
    [
        ({}, ["pass", "pass", "pass"]),
        ({"plug_in": 50.0}, ["fail", "fail", "pass"]),
        ({"plug_in": 34.9}, ["fail", "pass", "pass"]),
        ({"emulator_zero_shot": 30.0, "emulator_tuned": None}, ["pass", "not measured", "fail"]),
        ({"plug_in": None}, ["fail", "fail", "pass"]),
        (
            {
                "metric": "accuracy",
                "full_zero_shot": 0.5,
                "emulator_zero_shot": 0.3,
                "emulator_tuned": 0.8,
                "plug_in": 0.7,
            },
            ["pass", "fail", "pass"],
        ),
    ],
)
def test_the_three_checks_follow_the_numbers(
    make_run: MakeRun, quality: dict[str, float | None], verdicts: list[str]
) -> None:
    page = render_report(load_run(make_run([], summary(**quality))))
    found = re.findall(r'class="verdict \w+"><svg.*?</svg>(.*?)</span>', page)
    assert found == verdicts


def test_a_number_that_is_not_finite_is_told_and_not_drawn(make_run: MakeRun) -> None:
    page = rendered(make_run([*three_rounds(), round_line(3, None)], summary()))
    assert "not finite" in text_of(page)
    assert page.count("bad") == 3
    for _, attributes in page.tags:
        assert "nan" not in (attributes.get("d") or "").lower()


def test_the_curve_is_broken_where_it_is_not_finite(make_run: MakeRun) -> None:
    lines = [*three_rounds(), round_line(3, None), round_line(4, 21.0), round_line(5, 20.0)]
    page = rendered(make_run(lines, summary()))
    pieces = [found["d"] for _, found in page.tags if found.get("class") == "line plug"]
    # the legend's sample, then two pieces in each of three charts
    assert [piece.count("L") for piece in pieces if piece] == [0, 2, 1, 2, 1, 2, 1]


def test_bytes_and_seconds_are_summed_over_rounds_without_evaluation(make_run: MakeRun) -> None:
    lines = [round_line(0, 34.9), round_line(1, 0.0, quality=None), round_line(2, 22.0)]
    points = curve_points(load_run(make_run(lines)))
    assert [(p.server_round, p.num_bytes, p.seconds) for p in points] == [(0, 0, 0), (2, 3000, 4)]


def test_each_round_has_its_product_error_where_there_is_one(make_run: MakeRun) -> None:
    lines = [
        round_line(0, 34.9),
        round_line(1, 30.0, product_error=0.06874),
        round_line(2, 29.0, product_error=0.0),
        round_line(3, 28.0, product_error=None),
    ]
    page = render_report(load_run(make_run(lines)))
    table = page[page.index("All rounds") :]
    names = re.findall(r"<th[^>]*col[^>]*>(.*?)</th>", table)
    place = names.index("Product error") - 1  # the first column is a heading itself
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:6]]
    assert [row[place] for row in rows] == ["-", "0.0687", "0", "-"]
    assert "How far the product of LoRA" in page  # the glossary


def test_the_reference_run_has_its_curve(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), summary())
    assert rendered(folder).count("tuned") == 0
    make_run([round_line(0, 34.9), round_line(1, 19.0)], name="demo/full_tuned")
    page = rendered(folder)
    assert page.count("tuned") == 4
    assert "full tuned, best round, 19.00" in text_of(page)


def test_the_grid_has_a_mark_for_each_participant_and_round(make_run: MakeRun) -> None:
    lines = [
        round_line(0, 34.9, participants=[]),
        round_line(1, 30.0, participants=[participant("d10"), participant("d2", "late")]),
        round_line(2, 29.0, participants=[participant("server"), participant("d2", "rejected")]),
    ]
    page = render_report(load_run(make_run(lines, summary())))
    grid = page[page.index('<table class="who"') : page.index("did not count")]
    assert re.findall(r'class="name">(.*?)<', grid) == ["server", "d2", "d10"]
    rows = [re.findall(r'class="s-(\w+)"', row) for row in grid.split('class="name"')[1:]]
    assert rows == [["none", "accepted"], ["late", "rejected"], ["accepted", "none"]]
    assert "<title>round 1: late</title>" in grid


def on_rung(name: str, rung: str, emulator: int) -> Line:
    return participant(name, rung=rung, bytes_down=5000, bytes_up=3000, bytes_emulator=emulator)


def test_rungs_have_a_table(make_run: MakeRun) -> None:
    people = [on_rung("ann", "0.75", 4000), on_rung("bob", "0.5", 2000), on_rung("eve", "0.75", 0)]
    page = render_report(load_run(make_run([round_line(1, 30.0, participants=people)])))
    text = text_of(Page(page))
    assert "2 rungs: the share of blocks that an emulator keeps" in text
    assert re.search(r"0\.75\s+2\s+2\s+2\s+10\.0 kB\s+4\.0 kB\s+6\.0 kB", text)
    assert re.search(r"0\.5\s+1\s+1\s+1\s+5\.0 kB\s+2\.0 kB\s+3\.0 kB", text)
    assert "<title>round 1: accepted, rung 0.5</title>" in page


def test_where_all_hold_the_same_there_is_no_table_of_rungs(make_run: MakeRun) -> None:
    people = [on_rung("ann", "0.75", 4000), on_rung("eve", "0.75", 0)]
    page = rendered(make_run([round_line(1, 30.0, participants=people)]))
    assert "the share of blocks that an emulator keeps" not in text_of(page)


def test_lost_updates_are_listed_with_their_reason_and_first_round(make_run: MakeRun) -> None:
    lost = participant("ann", "rejected", reason="update has NaN in a")
    lines = [round_line(k, 30.0, participants=[participant("server"), lost]) for k in (3, 4)]
    text = text_of(rendered(make_run(lines)))
    assert "2 updates did not count" in text
    assert "update has NaN in a" in text
    assert "ann, round 3" in text


def test_hundreds_of_participants_are_cut_and_told(make_run: MakeRun) -> None:
    people = [participant(f"device-{index}") for index in range(300)]
    page = rendered(make_run([round_line(1, 30.0, participants=people)]))
    assert "the first 128 of 300 participants" in text_of(page)
    assert page.count("s-accepted") == 129  # with the legend's


@pytest.mark.parametrize("with_summary", [True, False])
@pytest.mark.parametrize("num_lines", [0, 1, 2])
def test_a_run_of_any_progress_has_a_report(
    make_run: MakeRun, num_lines: int, *, with_summary: bool
) -> None:
    result = summary() if with_summary else None
    page = rendered(make_run(three_rounds()[:num_lines], result))
    assert ("Still running or interrupted" in text_of(page)) is not with_summary


def test_a_summary_of_the_least_fields_has_a_report(make_run: MakeRun) -> None:
    result = {"schema": 1, "quality": {"metric": "accuracy"}}
    assert "Plug-in accuracy was not measured." in text_of(rendered(make_run([], result)))


def test_the_seed_is_told_as_it_was_set(make_run: MakeRun) -> None:
    page = text_of(rendered(make_run(three_rounds(), {**summary(), "seed": 1_234_567})))
    assert "seed 1234567 " in page


def test_every_chart_says_what_it_shows_and_ids_are_unique(make_run: MakeRun) -> None:
    page = rendered(make_run(three_rounds(), summary()))
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids)) == 6
    for tag, found in page.tags:
        if tag == "svg":
            assert found.get("aria-hidden") or found.get("aria-label") or found["aria-labelledby"]
        if tag == "th":
            assert found["scope"] in {"row", "col"}
    assert "from round 0: 34.90 to round 2: 22.00" in text_of(page)


def test_every_status_has_its_own_shape(make_run: MakeRun) -> None:
    statuses = ("accepted", "rejected", "dropped", "late", "failed")
    people = [participant(status, status) for status in statuses]
    others = [participant("absentee")]
    lines = [round_line(1, 30.0, participants=people), round_line(2, 29.0, participants=others)]
    page = render_report(load_run(make_run(lines)))
    legend = re.findall(r'<path d="([^"]+)" class="s-(\w+)"></path></svg>', page)
    shapes = {style: re.sub(r"[\d. -]", "", outline) for outline, style in legend}
    assert sorted(shapes) == sorted([*statuses, "none"])
    # the circle of "dropped" is hollow and large, that of "none" is filled and small
    assert len(set(shapes.values())) == 5


def test_simulated_time_and_energy_are_shown_where_there_are_any(make_run: MakeRun) -> None:
    result = summary()
    result["cost"] |= {"simulated_seconds": 7500.0, "simulated_joules": 12.34}
    text = text_of(rendered(make_run([], result)))
    assert "2 h 5 min" in text
    assert "12.3 J" in text


def test_a_long_run_tells_that_only_its_end_is_in_the_grid(make_run: MakeRun) -> None:
    lines = [round_line(k, 30.0, participants=[participant("ann")]) for k in range(1, 451)]
    page = rendered(make_run(lines))
    assert "the last 400 of 450 rounds" in text_of(page)
    assert page.count("s-accepted") == 401
    assert page.count("mark") == 3  # of so many points only the last has a dot


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance of #rgb or #rrggbb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): (#\w+)", blocks[scheme]))
    for ground in ("page", "panel", "wash"):
        for name, least in [(text, 4.5) for text in ("ink", "muted", "blue", "green", "red")] + [
            (mark, 3.0) for mark in ("orange", "purple", "faint", "r0", "r1", "r2", "r3")
        ]:
            pair = sorted((luminance(colors[name]), luminance(colors[ground])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (name, ground)


def test_importing_the_report_loads_neither_torch_nor_numpy() -> None:
    heavy = {"torch", "numpy", "transformers", "matplotlib"}
    code = (
        f"import json, sys, fedpeat.report; print(json.dumps(sorted({heavy} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
