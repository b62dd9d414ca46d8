"""What a newcomer types first is fast and complete."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedpeat.cli.main import main
from fedpeat.config.loading import setting_types

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "tyro", "rich", "yaml")


def imported(code: str, *argv: str) -> set[str]:
    """Return the heavy packages that a fresh Python has imported after some code."""
    script = f"""
import sys
try:
    {code}
except SystemExit as error:
    assert error.code == 0, error.code
print("\\n", *[name for name in {HEAVY!r} if name in sys.modules], sep="\\n")
"""
    command = [sys.executable, "-c", script, *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.split("\n\n")[-1].split())


def output_of(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("argv", ["--help", "--version", "run --help", "compare --help"])
def test_help_imports_nothing_heavy(argv: str) -> None:
    assert imported("from fedpeat.cli.main import main; main()", *argv.split()) == set()


def test_list_of_settings_needs_no_pytorch() -> None:
    code = "from fedpeat.cli.main import main; main()"
    assert imported(code, "settings") & {"torch", "transformers", "peft", "datasets"} == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import fedpeat") == set()


def test_help_takes_less_than_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "fedpeat", "--help"]
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(["--help"], capsys)
    for command in (
        "run",
        "compare",
        "evaluate",
        "export",
        "report",
        "status",
        "watch",
        "audit",
        "settings",
    ):
        assert re.search(rf"^ +{command} ", text, re.MULTILINE), command


def test_help_of_run_says_how_to_go_on_and_where_the_settings_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(output_of(["run", "CONFIG.yaml", "--help"], capsys).split())
    for part in (
        "--resume",
        "--overwrite",
        "--debug",
        "--local.local-steps 20",
        "fedpeat settings",
    ):
        assert part in text


def test_settings_lists_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output_of(["settings"], capsys)
    options = set(re.findall(r"--[a-z][\w.-]+", text))
    for name in setting_types():
        assert "--" + name.replace("_", "-") in options
    on_one_line = re.sub(r"[\s│]+", " ", text)  # which may break within "(default: 1)"
    assert on_one_line.count("(default: ") == len(setting_types())


def test_settings_gives_every_setting_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"[│╭╮╰╯─|+]", " ", output_of(["settings"], capsys))
    helps = re.split(r"^ *--[a-z]", text, flags=re.MULTILINE)[1:]
    assert len(helps) == len(setting_types())
    for text in helps:
        lines = text.split("(default:")[0].splitlines()[1:]
        assert any(line.strip() for line in lines), text


def test_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "fedpeat", "settings"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_command_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["train"], [], ["run"], ["report"], ["evaluate", "x", "--split", "train"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("fedpeat")


def test_setting_of_a_command_without_settings_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), "--seed", "3"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --seed 3" in capsys.readouterr().err
