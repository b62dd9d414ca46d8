"""``fedpeat status`` and ``fedpeat watch``, as a person types them."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from rich.console import Console

from cli.conftest import Refused
from fedpeat.cli.main import main
from fedpeat.cli.status import show
from fedpeat.core.run_lock import take_lock
from fedpeat.report.status_server import StatusServer
from fedpeat.report.watching import RunWatcher
from report.report_files import participant, round_line, summary, three_rounds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two rounds, that nobody works on."""
    made = tmp_path / "demo"
    made.mkdir()
    (made / "config.yaml").write_text("federated: {num_rounds: 8}\n")
    write(made, *three_rounds())
    take_lock(made).close()
    return made


def write(folder: Path, *lines: dict[str, object]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def shown(folder: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(RunWatcher(folder).standing(), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_status_tells_how_far_a_run_is_and_whether_it_is_alive(folder: Path) -> None:
    told = " ".join(shown(folder).split())
    assert told.startswith("demo stopped: no process works on it")
    assert "round 2 of 8, plug-in perplexity 22.00, 2.0 kB down, 1.0 kB up" in told
    with take_lock(folder):
        assert " ".join(shown(folder).split()).startswith("demo running round 2 of 8")
    (folder / "summary.json").write_text(json.dumps(summary()))
    assert " ".join(shown(folder).split()).startswith("demo finished")


def test_status_has_a_row_for_each_participant_and_a_line_for_each_event(folder: Path) -> None:
    told = {"rung": "0.5", "bytes_up": 1200, "last_loss": 2.25}
    late = participant("ann", "late", reason="slow", **told)
    line = round_line(3, 20.0, participants=[late], warnings=["odd"], set_aside=["ann"])
    write(folder, *three_rounds(), line)
    lines = [" ".join(line.split()) for line in shown(folder).splitlines()]
    assert "ann (set aside) late 0.5 round 2 2 of 3 2.25 0 B 1.2 kB" in lines
    assert "server (server) accepted - round 2 2 of 2 - 0 B 0 B" in lines
    assert lines[-2:] == ["round 3 warning odd", "round 3 fault ann late: slow"]


def test_no_name_can_steer_the_terminal(folder: Path) -> None:
    name = "\x1b[2J\x1b]0;title\x07[bold]x[/]\r\n\u202eann"
    line = round_line(
        3, 20.0, participants=[participant(name, "late", reason=name)], warnings=[name]
    )
    write(folder, *three_rounds(), line)
    told = shown(folder, width=200)
    assert "[bold]x[/]" in told
    assert not set(told) & set("\x1b\x07\r\u202e")


def test_status_prints_a_record_for_scripts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["status", str(folder), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["state"], record["server_round"]) == (1, "stopped", 2)


@pytest.mark.parametrize("command", ["status", "watch"])
def test_what_is_no_run_is_refused_in_one_line(
    command: str, refused: Refused, tmp_path: Path
) -> None:
    assert "must be a run folder, got no such folder" in refused(command, tmp_path / "nothing")
    assert "got none of them" in refused(command, tmp_path)


def test_watch_refuses_a_place_and_a_token_that_will_not_do(refused: Refused, folder: Path) -> None:
    with StatusServer(folder, port=0) as server:
        told = refused("watch", folder, "--port", server.port)
        assert told.endswith("the port is in use; choose another")
    assert "in [0, 65535], got 65536" in refused("watch", folder, "--port", "65536")
    assert "got 5 signs" in refused("watch", folder, "--token", "short")


@pytest.mark.parametrize("where", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - it has a token then
def test_watch_serves_until_ctrl_c_and_prints_a_token_where_one_is_needed(
    folder: Path, where: str
) -> None:
    listening = (  # a shell that started the tests in the background has Ctrl-C ignored
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('fedpeat', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", listening, "watch", str(folder), "--host", where]
    command += ["--port", "0"]
    environment = {key: value for key, value in os.environ.items() if key != "FEDPEAT_STATUS_TOKEN"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = urlsplit(process.stdout.readline().split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", url.port or 0, timeout=10)
        connection.request("GET", f"/?{url.query}")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
        rest = process.stdout.read()
        assert (process.returncode, process.stderr.read()) == (0, "")
    assert bool(url.query) == ("not encrypted" in rest) == (where != "127.0.0.1")


def test_watch_takes_its_token_from_the_environment(
    folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEAT_STATUS_TOKEN", "seven77")
    with StatusServer(folder, port=0) as server:  # where it cannot listen, whatever the token
        assert "got 7 signs" in refused("watch", folder, "--port", server.port)
