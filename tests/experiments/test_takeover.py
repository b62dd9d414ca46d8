"""Emulators of another run, taken over where they would be made just the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeat.config.loading import config_to_yaml, load_config, override
from fedpeat.config.schema import ComparisonPlan, Config
from fedpeat.core.errors import ConfigError, EmulatorError
from fedpeat.experiments import compare as comparison
from fedpeat.experiments.run import run
from outcomes import config_of, folder_of, result_of

LADDER: dict[str, Any] = {
    "emulator": {
        "recipe": "layer_drop:0.75+distill:256",
        "lower_rungs": [0.5],
        "distill_batch_size": 4,
    },
    "federated": {"num_rounds": 1},
}


@pytest.fixture(scope="module")
def made(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the settings of a run that is there, and made its emulators itself."""
    config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("made"), LADDER)
    run(config)
    return config


def taking(made: Config, tmp_path: Path, **changes: Any) -> Config:
    own = {"output_dir": str(tmp_path), "emulator": {"taken_from": str(folder_of(made))}}
    return override(override(made, own), changes)


def test_a_run_goes_as_if_it_had_made_them_itself(made: Config, tmp_path: Path) -> None:
    config = taking(made, tmp_path)
    run(config)
    assert result_of(folder_of(config)) == result_of(folder_of(made))
    log = (folder_of(config) / "log.txt").read_text()
    assert "taking over the emulators" in log
    assert "hidden-state error" not in log


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 7}, "seed 0 instead of 7"),
        ({"emulator": {"distill_batch_size": 2}}, "emulator.distill_batch_size 4 instead of 2"),
        ({"local": {"local_steps": 3}}, "local.local_steps"),
        ({"method": "fed_peft"}, "emulator.recipe layer_drop:0.75+distill:256 instead of full"),
        ({"method": "fed_eat"}, "adapter.method lora instead of none"),
    ],
)
def test_a_run_of_other_settings_is_refused(
    made: Config, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match="^emulator.taken_from must be a run .* got ") as refusal:
        run(taking(made, tmp_path, **changes))
    assert f"with {name}" in str(refusal.value)
    assert not (tmp_path / made.name).exists()


def test_what_emulators_do_not_depend_on_may_differ(made: Config, tmp_path: Path) -> None:
    run(taking(made, tmp_path, federated={"fraction_train": 0.5}, name="other"))
    assert (tmp_path / "other" / "summary.json").exists()


def test_a_folder_without_a_run_is_refused(made: Config, tmp_path: Path) -> None:
    config = override(taking(made, tmp_path), {"emulator": {"taken_from": str(tmp_path / "no")}})
    with pytest.raises(ConfigError, match="must be the folder of a run or calibration, got .*/no"):
        run(config)


def test_emulators_of_another_model_are_refused(made: Config, tmp_path: Path) -> None:
    source = override(made, {"output_dir": str(tmp_path), "federated": {"num_rounds": 0}})
    run(source)
    place = folder_of(source) / "emulator" / "manifest.json"
    text = place.read_text()
    parent = text.split('"parent_sha256": "')[1][:64]
    place.write_text(text.replace(parent, "0" * 64))
    with pytest.raises(EmulatorError, match="must be an emulator of model .*, got one of 0000"):
        run(taking(source, tmp_path / "own"))


def test_a_comparison_makes_them_once_for_a_seed_where_asked(
    made: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Config] = []

    def note(config: Config, *, overwrite: bool) -> dict[str, Any]:
        started.append(config)
        return finished

    finished = {
        "seed": 0,
        "quality": {
            "metric": "perplexity",
            **dict.fromkeys(comparison.QUALITIES, 2.0),
            "bits_per_byte": {"plug_in": 1.0},
        },
        "cost": dict.fromkeys(comparison.COSTS, 1.0),
        "emulator": None,
    }
    monkeypatch.setattr(comparison, "_run_in_process", note)
    variants = {
        "half": {"federated": {"fraction_train": 0.5}},
        "narrow": {"emulator": {"recipe": "layer_drop:0.75"}},
    }
    methods = ("fed_peft", "fedpeat", "half", "narrow")
    for shares, taken in ((True, ["", "", "fedpeat", ""]), (False, [""] * 4)):
        started.clear()
        plan = ComparisonPlan(methods, (0, 1), {}, variants, share_emulators=shares)
        comparison.compare(override(made, {"output_dir": str(tmp_path)}), plan)
        for seed in (0, 1):
            own = [c.emulator.taken_from for c in started if c.seed == seed]
            there = [f"{tmp_path / made.name / name}-seed{seed}" if name else "" for name in taken]
            assert own == there


def test_the_setting_is_kept_with_the_run(made: Config, tmp_path: Path) -> None:
    config = taking(made, tmp_path)
    path = tmp_path / "settings.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path).emulator.taken_from == str(folder_of(made))
