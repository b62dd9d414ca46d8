"""A command line in this process, whose every refusal is held to the promise: one clear line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from fedpeat.cli.main import main
from tiny import tiny_settings

Refused = Callable[..., str]
ConfigFile = Callable[..., Path]
FinishedRun = Callable[[int], Path]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Switch off the bars that a process of its own never shows, as the test's process may."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a command and returns the one line with which it is refused."""

    def run(*argv: object, exit_code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in argv])
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == exit_code, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with nested changes."""
    both = {k: merged(base[k], v) for k, v in changes.items() if isinstance(v, dict) and k in base}
    return {**base, **changes, **both}


@pytest.fixture
def config_file(model_dir: Path, corpus_file: Path, tmp_path: Path) -> ConfigFile:
    """Return a function that writes the settings of a tiny run, some changed."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        settings = tiny_settings(model_dir, corpus_file, tmp_path / "runs")
        path.write_text(yaml.safe_dump(merged(settings, changes)))
        return path

    return write


@pytest.fixture(scope="session")
def finished_runs(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """Return a function of a number of rounds: the folder of such a run, made once, for copies."""

    @cache
    def made(num_rounds: int) -> Path:
        folder = tmp_path_factory.mktemp("finished")
        settings = tiny_settings(model_dir, corpus_file, folder)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump({**settings, "federated": {"num_rounds": num_rounds}}))
        main(["run", str(path)])
        return folder / "tiny"

    return made


@pytest.fixture
def finished_run(finished_runs: FinishedRun, tmp_path: Path) -> FinishedRun:
    """Return a function that copies a finished run to where that of ``config_file`` would be."""
    return lambda num_rounds: Path(
        shutil.copytree(finished_runs(num_rounds), tmp_path / "runs" / "tiny")
    )
