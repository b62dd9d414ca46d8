"""What is wrong with an audit ends in one clear line; what is right is shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeat.cli.main import main
from tiny import tiny_model

Refused = Callable[..., str]
ConfigFile = Callable[..., Path]
SMALL = ["--public-text", "server", "--budget", "256", "--batch-size", "4"]


@pytest.fixture
def finished(finished_run: Callable[[int], Path]) -> Path:
    """Return the folder of a run of no rounds, which has an emulator all the same."""
    return finished_run(0)


def test_audit_shows_attacks_and_verdicts(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main(["audit", str(finished), *SMALL, "--learning-rates", "3e-3"])
    shown = capsys.readouterr().out
    for part in ("from scratch", "fine-tuned", "blocks put back", "bit for bit", "recovered"):
        assert part in shown, part
    assert (finished / "audit.json").exists()


def test_folder_without_an_emulator(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wanted = "must be a run folder with an emulator, or an emulator's folder, got"
    assert refused("audit", tmp_path / "empty", *SMALL) == f"{tmp_path}/empty {wanted} neither"
    line = refused("audit", tmp_path / "none", *SMALL)
    assert line == f"{tmp_path}/none {wanted} no such folder"


def test_audit_without_public_text_says_what_would_work(refused: Refused, finished: Path) -> None:
    line = refused("audit", finished)
    assert line.startswith("--public-text must be the attacker's text: a file, a folder, stdlib, ")
    assert "server" in line


def test_wrong_full_model(refused: Refused, finished: Path, model_dir: Path) -> None:
    other = Path(shutil.copytree(model_dir, finished.parent / "other"))
    tiny_model("llama", num_blocks=6, seed=1).save_pretrained(other)
    line = refused("audit", finished, *SMALL, "--model", other)
    assert "was made of a model with fingerprint" in line
    assert line.endswith("name the right one with --model")


def test_budget_below_one_batch(refused: Refused, finished: Path) -> None:
    line = refused("audit", finished, "--public-text", "server", "--budget", "100")
    assert line == "--budget must be at least one batch of 128 tokens, got 100"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--budget", "0"], "--budget must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--learning-rates", "0"], "--learning-rates must be greater than 0, got 0.0"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    ],
)
def test_setting_out_of_range(
    refused: Refused, tmp_path: Path, options: list[str], line: str
) -> None:
    assert refused("audit", tmp_path, "--public-text", "stdlib", *options) == line


def test_public_text_that_is_not_there_or_too_short(
    refused: Refused, finished: Path, tmp_path: Path
) -> None:
    line = refused("audit", finished, "--public-text", tmp_path / "none.txt")
    assert line.startswith("no such file: ")
    (tmp_path / "short.txt").write_text("the model")
    line = refused("audit", finished, "--public-text", tmp_path / "short.txt")
    assert "must have at least one block of 16 tokens" in line


def test_loss_that_is_not_finite(refused: Refused, finished: Path) -> None:
    line = refused("audit", finished, *SMALL, "--learning-rates", "1e30")
    assert line.startswith("emulator: from_scratch: loss is not finite after ")
    assert line.endswith("name lower --learning-rates")
    assert not (finished / "audit.json").exists()


def test_damaged_emulator(refused: Refused, finished: Path) -> None:
    weights = finished / "emulator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged" in refused("audit", finished, *SMALL)


def test_run_that_is_made_anew_loses_its_audit(finished: Path, config_file: ConfigFile) -> None:
    (finished / "audit.json").write_text("{}")
    main(["run", str(config_file(federated={"num_rounds": 0})), "--overwrite"])
    assert not (finished / "audit.json").exists()
