"""The main job, end to end on a tiny model and real files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import Config
from fedpeat.core.errors import AdapterError, ConfigError, FedPEATError
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments import bench
from fedpeat.experiments.emulators import make_emulators
from fedpeat.experiments.evaluate import evaluate_adapter
from fedpeat.experiments.export import export_adapter
from fedpeat.experiments.results import gap_closed
from fedpeat.experiments.run import run
from outcomes import lines_of
from tiny import tiny_settings

Finished = Callable[[str], tuple[Path, dict[str, Any]]]
METHODS = ["fedpeat", "fed_eat", "fed_peft", "fed_ft", "centralized", "local", "zero_shot"]


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_from_dict(tiny_settings(model_dir, corpus_file, tmp_path))


@pytest.fixture(scope="module")
def finished(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Return a function that makes a run by a method once: its folder, to be read, and summary."""
    folder = tmp_path_factory.mktemp("finished")
    config = config_from_dict(tiny_settings(model_dir, corpus_file, folder))

    @cache
    def made(method: str) -> tuple[Path, dict[str, Any]]:
        return folder / method, run(override(config, {"method": method, "name": method}))

    return made


def test_a_run_leaves_the_folder_that_the_readme_promises(finished: Finished) -> None:
    folder, summary = finished("fedpeat")
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "log.txt"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("checkpoints", "emulator", "adapter"):
        assert any((folder / name).iterdir()), name
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert [line["server_round"] for line in lines_of(folder)] == [0, 1, 2, 3]


def test_summary_has_every_key_of_the_interface(finished: Finished) -> None:
    _, summary = finished("fedpeat")
    assert summary.keys() >= {
        "schema",
        "method",
        "model",
        "num_parameters",
        "seed",
        "num_rounds",
        "num_clients",
        "versions",
    }
    assert summary["emulator"].keys() >= {"recipe", "num_parameters", "num_bytes"}
    assert summary["adapter"].keys() >= {"peft", "num_parameters", "num_bytes"}
    assert summary["quality"].keys() >= {
        "metric", "full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in",
        "full_tuned", "gap_closed",
    }  # fmt: skip
    assert summary["cost"].keys() >= {
        "bytes_down", "bytes_up", "wall_seconds", "peak_rss_bytes", "tokens_per_second",
        "simulated_seconds", "simulated_joules",
    }  # fmt: skip
    assert (summary["num_clients"], summary["num_rounds"]) == (4, 3)


def test_tuning_makes_the_full_model_better_on_held_out_text(config: Config) -> None:
    longer = override(config, {"federated": {"num_rounds": 12}, "local": {"local_steps": 8}})
    quality = run(longer)["quality"]
    assert quality["plug_in"] < 0.8 * quality["full_zero_shot"]


def test_bytes_reported_are_those_of_the_messages(finished: Finished) -> None:
    folder, summary = finished("fedpeat")
    lines = lines_of(folder)
    devices = [[p for p in line["participants"] if p["role"] == "device"] for line in lines]
    emulator = summary["emulator"]["num_bytes"]
    assert all(p["bytes_down"] > emulator for p in devices[1])
    assert all(
        summary["adapter"]["num_bytes"] < p["bytes_down"] < emulator for p in devices[2]
    )  # never sent again
    assert summary["cost"]["bytes_up"] == sum(p["bytes_up"] for line in devices for p in line)
    assert summary["cost"]["bytes_down"] == sum(p["bytes_down"] for line in devices for p in line)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_at_the_same_token_budget(finished: Finished, method: str) -> None:
    _, summary = finished(method)
    per_participant = 3 * 2 * 4 * 16  # rounds, steps, blocks, tokens
    participants = {"zero_shot": 0, "local": 4}.get(method, 5)
    assert summary["cost"]["num_tokens"] == participants * per_participant
    assert math.isfinite(summary["quality"]["plug_in"])
    assert (summary["emulator"] is None) == (method not in {"fedpeat", "fed_eat", "local"})


def test_zero_shot_plug_in_is_the_untouched_model(finished: Finished) -> None:
    quality = finished("zero_shot")[1]["quality"]
    assert quality["plug_in"] == quality["full_zero_shot"]


def test_upper_bound_and_gap_are_those_of_fed_peft(config: Config, finished: Finished) -> None:
    ours = run(override(config, {"evaluation": {"full_tuned": True}}))["quality"]
    bound = finished("fed_peft")[1]["quality"]
    assert ours["full_tuned"] == bound["plug_in"]
    expected = gap_closed(ours["full_zero_shot"], ours["plug_in"], bound["plug_in"])
    assert ours["gap_closed"] == expected


def test_gap_closed_worked_by_hand() -> None:
    assert gap_closed(100.0, 20.0, 10.0) == pytest.approx(math.log(5) / math.log(10))
    assert gap_closed(10.0, 9.0, 11.0) is None
    assert gap_closed(10.0, 9.0, None) is None


def test_emulator_without_compression_tunes_exactly_like_the_full_model(
    config: Config, finished: Finished
) -> None:
    ours = run(override(config, {"emulator": {"recipe": "full"}}))
    _, bound = finished("fed_peft")
    assert ours["quality"]["plug_in"] == bound["quality"]["plug_in"]


def test_server_can_be_switched_off(config: Config, tmp_path: Path) -> None:
    run(override(config, {"server": {"participates": False}}))
    roles = {p["role"] for line in lines_of(tmp_path / "tiny") for p in line["participants"]}
    assert roles == {"device"}


def test_evaluating_the_exported_adapter_gives_the_summarys_number(finished: Finished) -> None:
    folder, summary = finished("fedpeat")
    assert evaluate_adapter(folder)["perplexity"] == summary["quality"]["plug_in"]


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "none"])
@pytest.mark.parametrize("placement", ["ends", "top", "all"])
def test_every_adapter_and_placement_survives_the_trip_to_disk(
    config: Config, tmp_path: Path, method: str, placement: str
) -> None:
    changes = {
        "adapter": {"method": method, "placement": placement, "num_virtual_tokens": 4},
        "federated": {"num_rounds": 1},
    }
    summary = run(override(config, changes))
    assert evaluate_adapter(tmp_path / "tiny")["perplexity"] == summary["quality"]["plug_in"]


@pytest.mark.parametrize(
    ("recipe", "placement"),
    [
        ("int8", "all"),
        ("width:0.5+int4", "all"),
        ("greedy:0.5+width:0.5+distill:640+int8", "ends"),
        ("layer_drop:0.5+width:0.5+heads:0.5+distill:640+int8", "all"),
        ("width:0.5+width:0.5+heads:0.5", "all"),
    ],
)
def test_a_federation_runs_on_every_kind_of_emulator(
    config: Config, tmp_path: Path, recipe: str, placement: str
) -> None:
    changes = {
        "emulator": {"recipe": recipe},
        "adapter": {"placement": placement},
        "federated": {"num_rounds": 1},
    }
    summary = run(override(config, changes))
    statuses = [p["status"] for p in lines_of(tmp_path / "tiny")[-1]["participants"]]
    assert statuses == ["accepted"] * 5
    assert summary["quality"]["emulator_zero_shot"] != summary["quality"]["full_zero_shot"]
    assert evaluate_adapter(tmp_path / "tiny")["perplexity"] == summary["quality"]["plug_in"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "emulator": {"recipe": "width:0.5"},
                "adapter": {"placement": "all"},
                "method": "fed_eat",
            },
            "adapter.method must be lora, ia3 or prompt",
        ),
        (
            {"emulator": {"recipe": "int8"}, "adapter": {"method": "none"}},
            "lora works on top of int8",
        ),
    ],
)
def test_an_emulator_that_the_adapter_does_not_fit_is_refused(
    config: Config, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedPEATError, match=message):
        run(override(config, changes))


def test_merged_export_is_a_model_of_its_own_with_the_same_quality(
    config: Config, finished: Finished, tmp_path: Path
) -> None:
    folder, summary = finished("fedpeat")
    export_adapter(folder, tmp_path / "merged", merged=True)
    changes = {"method": "zero_shot", "name": "again", "model": {"name": str(tmp_path / "merged")}}
    again = run(override(config, changes))
    assert again["quality"]["full_zero_shot"] == pytest.approx(
        summary["quality"]["plug_in"], rel=1e-4
    )


def test_export_does_not_overwrite(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must not exist yet or be empty"):
        export_adapter(finished("fedpeat")[0], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_adapter_in_the_folder_is_the_best_rounds(finished: Finished) -> None:
    folder, _ = finished("fedpeat")
    newest = max((folder / "checkpoints").iterdir())
    best = {
        n.removeprefix("best/"): a
        for n, a in load_file(newest / "tensors.safetensors").items()
        if n.startswith("best/")
    }
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {n.removeprefix("base_model.model."): a.tobytes() for n, a in saved.items()} == {
        n: np.ascontiguousarray(a).tobytes() for n, a in best.items()
    }


def test_drop_outs_are_survived_and_recorded(config: Config, tmp_path: Path) -> None:
    changes = {"federated": {"dropout_ratio": 0.5, "num_rounds": 6}}
    summary = run(override(config, changes))
    statuses = [p["status"] for line in lines_of(tmp_path / "tiny") for p in line["participants"]]
    assert {"accepted", "dropped"} == set(statuses)
    assert math.isfinite(summary["quality"]["plug_in"])


@pytest.mark.slow
def test_peft_and_transformers_alone_reproduce_the_plug_in(finished: Finished) -> None:
    folder, summary = finished("fedpeat")
    script = Path(__file__).parents[2] / "benchmarks" / "check_export.py"
    command = [sys.executable, str(script), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[-1]) == pytest.approx(
        summary["quality"]["plug_in"], rel=1e-4
    )


def test_input_that_is_refused_leaves_no_folder_behind(config: Config, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        run(override(config, {"adapter": {"target_modules": ["nothing"]}}))
    assert not (tmp_path / "tiny").exists()


def test_emulator_of_a_run_that_never_began_is_not_taken_over(
    config: Config, finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished("fedpeat")[0], tmp_path / "tiny")
    for left in ("checkpoints", "summary.json"):  # as a kill during set-up leaves it
        path = tmp_path / "tiny" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    summary = run(override(config, {"emulator": {"recipe": "layer_drop:0.25"}}))
    assert summary["emulator"]["recipe"] == "layer_drop:0.25"


def test_overwriting_local_starts_every_device_anew(
    config: Config, finished: Finished, tmp_path: Path
) -> None:
    folder, first = finished("local")
    shutil.copytree(folder, tmp_path / "tiny")
    changes = {"method": "local", "federated": {"num_rounds": 1}, "seed": 1}
    again = run(override(config, changes), overwrite=True)
    assert again["cost"]["num_tokens"] == first["cost"]["num_tokens"] / 3


def test_the_emulator_of_devices_that_tune_alone_is_made_once(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(*args: Any, **kwargs: Any) -> dict[str, EmulatorPackage]:
        made.append(make_emulators(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(bench, "make_emulators", counted)
    summary = run(override(config, {"method": "local"}))
    (packages,) = made
    sizes = [package.manifest.num_bytes for package in packages.values()]
    assert sizes == [summary["emulator"]["num_bytes"]]
