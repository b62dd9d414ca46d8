"""The live page: says what there is, runs nothing but its own script, escapes everything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from fedpeat.core.run_lock import take_lock
from fedpeat.report.live_page import live_page, policy
from fedpeat.report.live_script import LIVE_STYLE
from fedpeat.report.watching import NO_METRICS, RunWatcher
from report.report_files import MakeRun, participant, round_line, summary, three_rounds

CONFIG = "method: fedpeat\nmodel: {name: bundled}\nfederated: {num_rounds: 8}\n"
HOSTILE = "<script>alert(1)</script>\"' onload=x <img src=x onerror=alert(1)> \u202e\ud800\x00"


class Page(HTMLParser):
    """Collects tags with their attributes, and texts; every tag is closed in order."""

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
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def page_of(folder: Path) -> str:
    return live_page(RunWatcher(folder).standing())


def row_of(page: str, name: str) -> list[str]:
    """Return the texts of a participant's cells."""
    row = next(part for part in page.split("<tr>") if f">{name}</span>" in part)
    cells = row.partition("</tr>")[0].split("<td")[1:]
    return [re.sub(r"<svg.*?</svg>|<[^>]+>", "", f"<td{cell}") for cell in cells]


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("12:00:00 reading data <b>\n")
    with take_lock(tmp_path):
        page = Page(page_of(tmp_path))
    assert "log: 12:00:00 reading data <b>" in page.text
    assert NO_METRICS in page.text
    assert "No round yet" in page.text
    assert "running" in page.text
    assert "No participant has been drawn yet." in page.text


def test_the_state_of_a_run_is_in_words(make_run: MakeRun) -> None:
    folder = make_run(three_rounds(), config=CONFIG)
    assert "not known whether it runs: there is no lock file" in page_of(folder)
    take_lock(folder).close()
    assert ">stopped: no process works on it; fedpeat run ... --resume goes on<" in page_of(folder)
    (folder / "summary.json").write_text(json.dumps(summary()))
    page = page_of(folder)
    assert ">finished<" in page
    assert "<h1>Plug-in perplexity 21.3, down from 34.9" in page


def test_what_an_operator_looks_for_is_there(make_run: MakeRun) -> None:
    told = {"rung": "0.5", "last_loss": 2.5, "bytes_down": 3000, "bytes_up": 100}
    lines = [
        *three_rounds(),
        round_line(
            3,
            20.0,
            participants=[participant("server"), participant("ann", "late", reason="slow", **told)],
            warnings=["dan sits out: no answer"],
        ),
    ]
    folder = make_run(lines, config=CONFIG)
    with take_lock(folder):
        page = page_of(folder)
    text = Page(page).text
    for part in (
        "Round 3 of 8: plug-in perplexity 20.0, from 34.9 before tuning.",
        "1 of 2",
        "about 10.0 s to go",
        "4.5 kB",
        "3.0 kB down, 1.5 kB up",
        "dan sits out: no answer",
        "1 sits out",
        "ann late: slow",
    ):
        assert part in text, part
    cells = row_of(page, "ann")
    assert cells[:1] + cells[2:] == [
        "lateslow",
        "round 2, 1 ago",
        "2 of 3",
        "0.5",
        "2.50",
        "3.0 kB",
        "100 B",
    ]
    assert page.count('class="line plug"') == 4  # a curve in each of three charts, and the legend


def test_no_text_of_a_run_can_become_markup(make_run: MakeRun) -> None:
    people = [
        participant(HOSTILE, "rejected", reason=HOSTILE, rung=HOSTILE),
        participant("server", "late", reason=HOSTILE),
    ]
    lines = [round_line(0, 34.9), round_line(1, 28.0, participants=people, warnings=[HOSTILE])]
    config = json.dumps({"method": HOSTILE, "model": {"name": HOSTILE}})
    folder = make_run(lines, config=config, name="<b onclick=x>")
    make_run([], name="<b onclick=x>/clients/<i onload=x>")
    take_lock(folder / "clients" / "<i onload=x>").close()
    sent = live_page(RunWatcher(folder).standing()).encode()
    page = Page(sent.decode())
    assert [tag for tag, _ in page.tags if tag in {"script", "img", "b", "i"}] == ["b", "script"]
    attributes = {name for _, found in page.tags for name in found}
    assert not [name for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "<i onload=x>" in page.text
    assert not re.search("[\x00\u202e\ud800]", page.text)


def test_the_policy_lets_this_script_and_this_style_run_and_no_other(make_run: MakeRun) -> None:
    page = page_of(make_run(three_rounds()))
    for tag in ("script", "style"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy()
    assert "default-src 'none'" in policy()


def test_the_page_loads_nothing_from_elsewhere(make_run: MakeRun) -> None:
    page = Page(page_of(make_run(three_rounds())))
    addresses = [
        value
        for _, found in page.tags
        for name, value in found.items()
        if name in {"src", "href", "xlink:href", "action", "style"}
    ]
    assert addresses == ["data:,"]  # no icon, and no request for one
    assert "url(" not in LIVE_STYLE
    assert "@import" not in LIVE_STYLE


def test_every_part_has_an_id_of_its_own_whatever_there_is_to_show(make_run: MakeRun) -> None:
    empty, whole = make_run([]), make_run(three_rounds(), summary(), CONFIG, name="whole")
    found = [
        [
            str(each["id"])
            for tag, each in Page(page_of(folder)).tags
            if "id" in each and "-" not in str(each["id"])
        ]
        for folder in (empty, whole)
    ]
    parts = "top figures remarks progress participants events rounds stages link".split()
    assert found == [parts, parts]


def test_who_is_set_aside_is_told_and_marked(make_run: MakeRun) -> None:
    people = [participant("ann", "rejected"), participant("bob"), participant("server")]
    lines = [round_line(1, 28.0, participants=people, set_aside=["ann", "server"])]
    page = page_of(make_run(lines))
    assert "Set aside after too many rejected updates: ann, server." in page
    assert re.findall(r'class="name">(\w+)</span>(?:<span class="badge">([\w ]+)<)?', page) == [
        ("server", "server"),
        ("ann", "set aside"),
        ("bob", ""),
    ]


def test_a_crowd_is_cut_with_those_in_trouble_in_front(make_run: MakeRun) -> None:
    people = [participant(f"d{i:03}", "late" if i == 250 else "accepted") for i in range(300)]
    page = page_of(make_run([round_line(1, 28.0, participants=people)]))
    assert "Shown: 200 of 300 participants" in page
    assert ">d250<" in page
    assert ">d299<" not in page


def test_a_long_run_stays_a_small_page(make_run: MakeRun) -> None:
    said = [f"d{index} sits out: {'w' * 5000}" for index in range(20)]
    lines = [round_line(n, 30.0, warnings=said[:1]) for n in range(500)]
    lines[-1] |= {"warnings": said}
    page = page_of(make_run(lines))
    assert len(page) < 150_000
    assert "the last 25 of 500 lines" in page
    assert "8 more of these." in page


def test_numbers_that_are_not_finite_are_told(make_run: MakeRun) -> None:
    page = Page(page_of(make_run([*three_rounds(), round_line(3, None)], config=CONFIG)))
    assert "Round 3 of 8: plug-in perplexity not finite." in page.text
    for _, attributes in page.tags:
        assert "nan" not in (attributes.get("d") or "").lower()
