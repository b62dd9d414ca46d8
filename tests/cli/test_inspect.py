"""``fedpeat inspect`` shows how a model would be cut, and ends with 2 where it cannot be."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import fedpeat
from fedpeat.cli.inspection import show
from fedpeat.cli.main import main
from tiny import tiny_model

Refused = Callable[..., str]


def test_what_was_found_kept_and_tried_is_shown(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(model_dir), "--num-bottom", "1", "--num-top", "1", "--ratios", "0.5"])
    shown = capsys.readouterr().out
    for part in (
        "LlamaForCausalLM",
        "6 blocks",
        "model.layers",
        "LlamaDecoderLayer",
        "█■■■■█",
        "█■··■█",
        "an emulator of all blocks answers as the full model",
        "cut and plugged back, every weight and every answer is as before",
    ):
        assert part in shown


def test_record_for_scripts_is_json(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(model_dir), "--json", "--placement", "top", "--ratios", "0.5", "1"])
    record = json.loads(capsys.readouterr().out)
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["tuned"] == [4, 5]
    assert [rung["kept"] for rung in record["rungs"]] == [[0, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert len(record["checks"]) == 4


def test_model_that_cannot_be_cut_ends_with_2_in_one_line(
    model_dir: Path, refused: Refused
) -> None:
    assert refused("inspect", model_dir, "--blocks", "model.norm") == (
        "model.norm must be a ModuleList or Sequential of LlamaForCausalLM, got LlamaRMSNorm; "
        "found: model.layers (6)"
    )
    assert "no such model folder" in refused("inspect", model_dir / "nothing")


def test_run_refuses_a_half_that_the_model_does_not_have(
    config_file: Callable[..., Path], refused: Refused
) -> None:
    assert refused("run", config_file(model={"cut": "encoder"})) == (
        "LlamaForCausalLM has no encoder to cut by itself; model.cut must be both, got encoder"
    )


def test_needed_blocks_are_marked_and_explained_on_any_terminal() -> None:
    model = tiny_model("llama")
    model.config.kinds = ["one"] + ["other"] * 5
    found = fedpeat.inspect(model, num_bottom=0, num_top=1)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(found, Console(file=screen, width=80))
    screen.flush()
    shown = screen.buffer.getvalue().decode()
    assert "NooooT" in shown
    assert "block 0: is alone of its kind" in shown
