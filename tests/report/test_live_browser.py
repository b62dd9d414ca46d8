"""The live page in a real browser: it goes on by itself, and nothing hostile runs in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeat.core.run_lock import take_lock
from fedpeat.report.status_server import StatusServer
from report.browser import CHROMIUM, Browser
from report.report_files import MakeRun, participant, round_line, three_rounds

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

NOW = "document.dispatchEvent(new Event('visibilitychange'))"
"""What makes the page ask at once, as it does when it is looked at again."""
HEADLINE = "document.querySelector('h1').textContent"

Watch = Callable[..., StatusServer]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def folder(make_run: MakeRun) -> Iterator[Path]:
    """A run that is going on."""
    made = make_run(three_rounds(), config="federated: {num_rounds: 8}\n")
    with take_lock(made):
        yield made


@pytest.fixture
def watch(folder: Path) -> Iterator[Watch]:
    started: list[StatusServer] = []

    def start(**options: Any) -> StatusServer:
        server = StatusServer(folder, **({"port": 0} | options)).start()
        server._watcher._interval = 0.0  # noqa: SLF001 - a test does not wait
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def append(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_rounds_show_up_by_themselves_without_a_reload(
    browser: Browser, watch: Watch, folder: Path
) -> None:
    browser.open(watch().url)
    assert browser.value(HEADLINE).startswith("Round 2 of 8: plug-in perplexity 22.0")
    browser.value("window.same = document.getElementById('top').parentNode")
    assert browser.value("document.querySelectorAll('#participants tbody tr').length") == 2
    late = participant("zoe", "late", reason="slow")
    append(folder, round_line(3, 20.0, participants=[late], warnings=["odd"]))
    browser.wait_for(f"{HEADLINE}.startsWith('Round 3 of 8: plug-in perplexity 20.0')")
    assert browser.value("document.title") == "Round 3 of 8 \u00b7 demo - fedpeat"
    assert browser.value("window.same === document.getElementById('top').parentNode")
    assert browser.value("document.querySelectorAll('#participants tbody tr').length") == 3
    assert browser.value("document.querySelectorAll('#progress svg circle').length") == 12
    assert "zoe late: slow" in browser.value("document.querySelector('#events').innerText")


def test_a_part_that_has_not_changed_is_left_alone_and_a_new_one_keeps_its_place(
    browser: Browser, watch: Watch, folder: Path
) -> None:
    browser.open(watch().url, width=400)
    browser.value("window.old = [...document.querySelectorAll('main > [id]')]")
    browser.value("document.querySelector('#participants .scroll').scrollLeft = 40")
    append(folder, round_line(3, 22.0))
    browser.value(NOW)
    browser.wait_for(f"{HEADLINE}.startsWith('Round 3')")
    kept = browser.value("window.old.filter(one => one.isConnected).map(one => one.id)")
    assert {"remarks", "events", "stages"} <= set(kept)
    assert not {"top", "participants", "rounds"} & set(kept)
    assert browser.value("document.querySelector('#participants .scroll').scrollLeft") == 40


def test_a_script_as_a_name_is_a_name(browser: Browser, watch: Watch, folder: Path) -> None:
    name = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    append(folder, round_line(3, 20.0, participants=[participant(name, "late", reason=name)]))
    browser.open(watch().url)
    append(folder, round_line(4, 19.0, participants=[participant(name + "2", reason=name)]))
    browser.value(NOW)
    browser.wait_for(f"{HEADLINE}.startsWith('Round 4')")
    names = browser.value("[...document.querySelectorAll('.name')].map(one => one.textContent)")
    assert [shown for shown in names if shown.startswith("<script>window.hacked = 1<")]
    assert browser.value("window.hacked") is None
    assert browser.value("document.querySelectorAll('script, img').length") == 1


def test_the_policy_stops_a_script_that_gets_in_all_the_same(
    browser: Browser, watch: Watch
) -> None:
    browser.open(watch().url)
    browser.value(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.hacked = 1'}));"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"hacked = 2\">')"
    )
    browser.value("new Promise(done => setTimeout(done, 100))")
    assert browser.value("window.hacked") is None
    assert browser.told("Log.entryAdded"), "the browser tells what the policy has stopped"


def test_the_page_asks_its_own_server_only_and_the_browser_finds_no_fault(
    browser: Browser, watch: Watch, folder: Path
) -> None:
    server = watch()
    browser.open(server.url)
    append(folder, round_line(3, 20.0))
    browser.value(NOW)
    browser.wait_for(f"{HEADLINE}.startsWith('Round 3')")
    asked = {event["request"]["url"] for event in browser.told("Network.requestWillBeSent")}
    assert asked - {"data:,"} == {server.url}
    assert browser.told("Log.entryAdded") == []
    assert browser.told("Runtime.exceptionThrown") == []


def test_the_token_leaves_the_address_and_goes_on_in_a_cookie(
    browser: Browser, watch: Watch, folder: Path
) -> None:
    server = watch(token="0123456789-abcdefgh")
    browser.open(server.url)
    assert "the token is missing" in browser.value("document.body.innerText")
    browser.open(f"{server.url}?token={server.token}")
    assert browser.value("location.href") == server.url
    assert browser.value("document.cookie") == ""
    append(folder, round_line(3, 20.0))
    browser.value(NOW)
    browser.wait_for(f"{HEADLINE}.startsWith('Round 3')")


def test_a_server_that_is_gone_is_told_until_it_is_back(browser: Browser, watch: Watch) -> None:
    server = watch()
    browser.open(server.url)
    assert browser.value("document.getElementById('link').hidden")
    server.stop()
    browser.value(NOW)
    browser.wait_for("document.getElementById('link').innerText.startsWith('No answer from')")
    watch(port=server.port)
    browser.value(NOW)
    browser.wait_for("document.getElementById('link').hidden")


def test_a_page_of_another_name_cannot_read_the_run(browser: Browser, watch: Watch) -> None:
    server = watch()
    browser.open(f"http://evil.test:{server.port}/")
    assert browser.value("document.body.innerText").strip() == "this server has another name"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 600, 1280])
def test_the_page_fits_and_follows_the_colours_asked_for(
    browser: Browser, watch: Watch, folder: Path, scheme: str, width: int
) -> None:
    names = ["a-device-with-a-very-long-name-indeed.hospital.example" * 2, "short"]
    people = [participant(name, "failed", reason="why " * 60 + "x" * 200) for name in names]
    append(folder, round_line(3, 20.0, participants=people, warnings=["w" * 300]))
    browser.open(watch().url, width=width, scheme=scheme)
    assert browser.value("document.documentElement.scrollWidth - window.innerWidth") <= 0
    colour = browser.value("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 18, 22)")
