"""A run killed at any moment ends as if it had never been (invariant 10)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeat.config.loading import config_to_yaml, load_config, override
from fedpeat.config.schema import Config
from fedpeat.core.errors import CheckpointError
from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.progress import SCHEMA
from fedpeat.experiments.run import run
from outcomes import (
    EVERYTHING_ON,
    PLAIN,
    assert_same,
    config_of,
    lines_of,
    result_of,
)

PROGRAM = Path(__file__).parent.parent / "killable.py"


class Forks:
    """Runs the command in forks of one process, and kills them on request."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, config: Config, *flags: str, within: str = "", **kill: float) -> dict[str, Any]:
        """Run once; ``within`` names the part of the run folder whose events count."""
        folder = Path(config.output_dir) / config.name
        folder.parent.mkdir(exist_ok=True)
        settings = folder.with_suffix(".yaml")
        settings.write_text(config_to_yaml(config))
        task = {"args": ["run", str(settings), *flags], "folder": str(folder / within), **kill}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        ended = result["exit_code"]
        assert ended in ({0, -signal.SIGKILL} if kill else {0}), result["stderr"]
        return result


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(PROGRAM)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()


# --- kills --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [PLAIN, EVERYTHING_ON], ids=["plain", "everything on"])
def test_a_run_killed_again_and_again_ends_bit_identical(
    changes: dict[str, Any], forks: Forks, model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    whole = config_of(model_dir, corpus_file, tmp_path / "whole", changes)
    uninterrupted = forks.run(whole)
    want = result_of(tmp_path / "whole" / "tiny")
    assert [line["server_round"] for line in want["rounds"]] == [0, 1, 2, 3]

    rng = np.random.default_rng(len(changes))
    killed = config_of(model_dir, corpus_file, tmp_path / "killed", changes)
    for low, high in kill_windows(uninterrupted["num_events"]):
        at = int(rng.integers(low, high))
        assert forks.run(killed, "--resume", kill_at_event=at)["exit_code"] == -signal.SIGKILL
    at_any_time = float(rng.uniform(0, uninterrupted["seconds"]))
    forks.run(killed, "--resume", kill_after_seconds=at_any_time)
    forks.run(killed, "--resume")
    assert_same(want, result_of(tmp_path / "killed" / "tiny"))


def kill_windows(num_events: int) -> list[tuple[int, int]]:
    """Return ranges of events to kill at: in set-up, in the first rounds, in what is left."""
    return [(1, 8), (8, num_events // 3), (num_events // 4, num_events // 2), (8, 40)]


def test_a_kill_at_each_step_of_a_checkpoint_loses_nothing(
    forks: Forks, model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    # the cheapest run there is: it makes no emulator anew after each of many kills
    changes = {
        "method": "fed_peft",
        "federated": {"num_rounds": 1},
        "local": {"local_steps": 1},
    }
    whole = config_of(model_dir, corpus_file, tmp_path / "whole", changes)
    num_events = forks.run(whole, within="checkpoints")["num_events"]
    killed = config_of(model_dir, corpus_file, tmp_path / "killed", changes)
    folder = tmp_path / "killed" / "tiny"
    kept = []
    for event in range(1, num_events + 1):  # a checkpoint that is there once must stay
        forks.run(killed, "--resume", within="checkpoints", kill_at_event=event)
        kept.append((folder / "checkpoints" / "round-00001" / "seal.json").exists())
    assert kept == sorted(kept)
    assert set(kept) == {False, True}
    forks.run(killed, "--resume")
    assert_same(result_of(tmp_path / "whole" / "tiny"), result_of(folder))


# --- resuming -----------------------------------------------------------------------------------


class Listening(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def everything_on(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a finished run with all there is switched on, not to be changed."""
    folder = tmp_path_factory.mktemp("everything-on")
    run(config_of(model_dir, corpus_file, folder, EVERYTHING_ON))
    return folder / "tiny"


def test_resuming_a_finished_run_changes_nothing(everything_on: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    config = copied(everything_on, tmp_path)
    first = json.loads((folder / "summary.json").read_text())
    metrics, want = (folder / "metrics.jsonl").read_bytes(), result_of(folder)
    again = run(config, resume=True)
    assert again["quality"] == first["quality"]
    assert again["best_round"] == first["best_round"]
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert_same(want, result_of(folder))


def test_a_run_can_be_resumed_for_more_rounds(
    everything_on: Path, model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    config = config_of(model_dir, corpus_file, tmp_path, EVERYTHING_ON)
    run(override(config, {"federated": {"num_rounds": 1}}))
    run(config, resume=True)
    assert_same(result_of(everything_on), result_of(tmp_path / "tiny"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "seal.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "remove"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    file: str, damage: Any, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, want = finished
    config = copied(source, tmp_path)
    damage(tmp_path / "tiny" / "checkpoints" / "round-00003" / file)
    observer = Listening()
    run(config, resume=True, observer=observer)
    assert_same(want, result_of(tmp_path / "tiny"))
    (warning,) = [m for m in observer.messages if "damaged" in m]
    assert "round-00003" in warning
    assert warning.endswith("trying the one before")


def test_when_every_checkpoint_is_damaged_the_run_stops_with_a_remedy(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = copied(finished[0], tmp_path)
    for checkpoint in (tmp_path / "tiny" / "checkpoints").iterdir():
        cut(checkpoint / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="start anew with --overwrite"):
        run(config, resume=True)


def test_a_device_that_held_the_emulator_is_not_sent_it_again(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = copied(finished[0], tmp_path)
    run(override(config, {"federated": {"num_rounds": 5}}), resume=True)
    emulator = (tmp_path / "tiny" / "emulator" / "model.safetensors").stat().st_size
    rounds = lines_of(tmp_path / "tiny")
    got = [sum(p["bytes_down"] > emulator for p in line["participants"]) for line in rounds]
    assert got == [0, 4, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def finished(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a finished run, to be copied and damaged, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    run(config_of(model_dir, corpus_file, folder, PLAIN))
    return folder / "tiny", result_of(folder / "tiny")


def copied(source: Path, folder: Path) -> Config:
    """Copy a finished run and return the settings to go on with it."""
    shutil.copytree(source, folder / "tiny")
    return override(load_config(source / "config.yaml"), {"output_dir": str(folder)})


def test_the_checkpoint_holds_adapter_best_and_moments(everything_on: Path) -> None:
    names = load_file(everything_on / "checkpoints" / "round-00003" / "tensors.safetensors")
    assert {name.split("/")[0] for name in names} == {"adapter", "best", "moments"}


@pytest.mark.parametrize("schema", [None, 0, SCHEMA + 1])
def test_a_checkpoint_of_another_version_is_refused_with_a_remedy(
    schema: int | None, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = copied(finished[0], tmp_path)
    folder = RunFolder(tmp_path / "tiny")
    checkpoint = folder.latest_checkpoint(lambda _: None)
    assert checkpoint is not None
    state = {name: value for name, value in checkpoint.state.items() if name != "kept"}
    folder.save_checkpoint(replace(checkpoint, state={**state, "schema": schema}))
    with pytest.raises(CheckpointError, match=f"must be {SCHEMA}, got {schema}; .*--overwrite"):
        run(config, resume=True)
