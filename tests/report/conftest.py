"""Run folders for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from report.report_files import Line, MakeRun


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run folder from lines and a summary; None leaves a file out."""

    def make(
        lines: Sequence[Line] | None = None,
        result: Line | None = None,
        config: str | None = "name: demo\n",
        name: str = "demo",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if config is not None:
            (folder / "config.yaml").write_text(config)
        if lines is not None:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
        if result is not None:
            (folder / "summary.json").write_text(json.dumps(result))
        return folder

    return make
