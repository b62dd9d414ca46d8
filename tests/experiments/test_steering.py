"""Real federations in a simulated world: calibrated, learnt, steered, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeat.config.loading import config_to_yaml, override
from fedpeat.config.schema import Config
from fedpeat.control.quality_fit import RoundLog
from fedpeat.core.errors import CalibrationError, CheckpointError, ConfigError, FedPEATError
from fedpeat.experiments import calibrate as calibration
from fedpeat.experiments import learn as learning
from fedpeat.experiments.calibrate import calibrate, design_of, log_of
from fedpeat.experiments.learn import learn, world_of
from fedpeat.experiments.run import run
from outcomes import assert_resumes, config_of, lines_of

WORLD: dict[str, Any] = {
    "emulator": {"recipe": "layer_drop:0.75", "lower_rungs": [0.5, 0.25]},
    "world": {"preset": "mixed"},
    "controller": {
        "local_steps": [1, 3],
        "server_steps": [0, 2],
        "total_steps": 8_000,
        "num_envs": 128,
    },
    "calibration": {
        "num_federations": 12,
        "num_rounds": 5,
        "num_members": 2,
        "max_error": 5.0,
    },
    "federated": {"num_rounds": 3},
}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, WORLD)


def devices_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in line["participants"] if p["role"] == "device"]


def test_a_round_costs_simulated_time_energy_and_the_bytes_that_were_sent(
    config: Config, tmp_path: Path
) -> None:
    summary = run(override(config, {"world": {"preset": "laptop"}}))
    lines = lines_of(tmp_path / "tiny")[1:]
    for line in lines:
        real = sum(p["bytes_down"] + p["bytes_up"] for p in devices_of(line))
        assert line["simulated"]["bytes"] == pytest.approx(real, rel=0.1)  # heads of parts
        assert line["simulated"]["seconds"] > 0
        assert line["simulated"]["joules"] > 0
    for name in ("seconds", "joules", "bytes"):
        total = sum(line["simulated"][name] for line in lines)
        assert summary["cost"][f"simulated_{name}"] == pytest.approx(total)


def test_without_a_world_nothing_is_simulated(config: Config, tmp_path: Path) -> None:
    summary = run(override(config, {"world": {"preset": None}}))
    assert summary["cost"]["simulated_seconds"] is None
    assert all(line["simulated"] == {} for line in lines_of(tmp_path / "tiny"))


def test_scale_makes_a_model_larger_in_the_simulated_world_alone(
    config: Config, tmp_path: Path
) -> None:
    costs = []
    for scale in (1.0, 100.0):
        changes = {"name": f"x{scale:g}", "world": {"preset": "laptop", "workload_scale": scale}}
        costs.append(run(override(config, changes))["cost"])
    assert costs[1]["simulated_bytes"] == pytest.approx(100 * costs[0]["simulated_bytes"], rel=1e-3)
    assert costs[1]["bytes_down"] == costs[0]["bytes_down"]


def test_a_world_without_room_for_the_model_is_refused(config: Config) -> None:
    with pytest.raises(FedPEATError, match="no device of a mixed world can hold any rung"):
        run(override(config, {"world": {"workload_scale": 1e9}}))


def test_random_choices_use_every_rung_and_number_of_steps(config: Config, tmp_path: Path) -> None:
    run(override(config, {"controller": {"kind": "random"}, "federated": {"num_rounds": 12}}))
    on_it = [p["rung"] for line in lines_of(tmp_path / "tiny") for p in devices_of(line)]
    assert set(on_it) == {"0.75", "0.5", "0.25"}


def test_a_simulated_world_goes_on_after_an_interruption(config: Config) -> None:
    realigned = {
        "controller": {"kind": "random", "realigns": True},
        "server": {"realign_tokens": 256, "realign_rank": 2},
        "emulator": {"distill_batch_size": 4},
    }
    assert_resumes(override(config, realigned), 2)


# --- calibration and learning -------------------------------------------------------------------


def test_plans_of_a_calibration_cover_what_there_is_to_plan(config: Config) -> None:
    many = override(config, {"calibration": {"num_federations": 40}})
    plans = [design_of(many, index, 3) for index in range(40)]
    lone = [plan for plan in plans if max(plan.rung_share) == 1]
    assert len(lone) == 20
    assert {plan.rung_share for plan in lone} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    assert all(sum(plan.rung_share) == pytest.approx(1) for plan in plans)
    for name, wanted in (("local_steps", [1, 3]), ("server_steps", [0, 2])):
        assert [[getattr(p, name) for p in plans].count(n) for n in wanted] == [20, 20]
    assert sum(plan.is_skewed for plan in plans) == 20
    assert sum(plan.pool == 1 for plan in plans) == 20
    assert min(plan.pool for plan in plans) < 0.1
    fractions = sorted(plan.fraction for plan in plans)
    assert all(place / 40 <= f < (place + 1) / 40 for place, f in enumerate(fractions) if place)


def test_data_that_are_alike_are_not_shared_out_anew(config: Config) -> None:
    alike = override(config, {"data": {"partition": "iid", "num_clients": 3}})
    assert all(design_of(alike, index, 3).is_skewed for index in range(12))


def test_devices_of_late_are_those_of_the_rounds(finished: tuple[Config, Path]) -> None:
    _, folder = finished
    number = json.loads((folder / "calibration.json").read_text())["num_devices"]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["design"]["is_skewed"]]
    others = [line for line in lines if not line["design"]["is_skewed"]]
    assert own
    assert others
    assert all(line["num_recent"] == number for line in others)
    for line in own:
        assert line["num_recent"] >= 1
        if line["round"] == 1:
            assert line["num_recent"] == pytest.approx(line["num_effective"])
    assert len({line["num_recent"] for line in own}) > 2


@pytest.fixture(scope="module")
def finished(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path]:
    config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("calibration"), WORLD)
    folder, _ = calibrate(config)
    return config, folder


@pytest.fixture
def calibrated(finished: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    """Return settings and a folder of calibration of the test's own."""
    config, folder = finished
    shutil.copytree(folder, tmp_path / config.name)
    return config, tmp_path / config.name


def goes_on(config: Config, folder: Path) -> None:
    """Calibrate again with the folder of a test, which knows of no other place."""
    config = override(config, {"output_dir": str(folder.parent)})
    (folder / "config.yaml").write_text(config_to_yaml(config))
    calibrate(config)


def test_calibrated_learnt_and_steered(
    calibrated: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_NUM_JUDGES", 100)
    config, folder = calibrated
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) == 12 * 5
    config = override(config, {"output_dir": str(tmp_path)})
    controller, found = learn(config, folder)
    assert set(found["returns"]) == {
        "tuned_fixed", "random", "round_robin", "channel", "deadline", "descent", "sabppo",
    }  # fmt: skip
    assert found["returns"]["tuned_fixed"]["mean"] > found["returns"]["random"]["mean"]
    for kind in ("sabppo", "tuned_fixed", "descent"):
        steered = {"name": kind, "controller": {"kind": kind, "policy": str(controller)}}
        summary = run(override(config, steered))
        assert summary["num_rounds"] == 3
        assert summary["cost"]["simulated_seconds"] >= 0
    other = {"name": "other", "emulator": {"lower_rungs": [0.5]}, "controller": {"kind": "sabppo"}}
    changed = override(override(config, steered), other)
    with pytest.raises(CheckpointError, match="must be for rungs"):
        run(changed)


def test_a_calibration_goes_on_where_it_was_interrupted(
    config: Config, finished: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = finished
    real = calibration._federation  # noqa: SLF001
    done: list[int] = []

    def counted(*args: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[2])
        return real(*args)

    monkeypatch.setattr(calibration, "_federation", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(config)
    assert done == [0, 1, 2]
    done[:] = [0, 1, 2, 0]  # never three again
    folder, _ = calibrate(config)
    assert done[4:] == list(range(3, 12))
    for name in ("rounds.jsonl", "quality.json", "calibration.json"):
        assert (folder / name).read_text() == (whole / name).read_text()


def test_federations_begin_from_the_same_untouched_model(calibrated: tuple[Config, Path]) -> None:
    _, folder = calibrated
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    starts = {line["before"] for line in rounds if line["round"] == 1}
    facts = json.loads((folder / "calibration.json").read_text())
    assert starts == {facts["start_loss"]}
    assert len({line["after"] for line in rounds}) == len(rounds)


def test_designs_are_spread_over_all_there_is(config: Config) -> None:
    config = override(config, {"calibration": {"num_federations": 40}})
    designs = [design_of(config, index, 3) for index in range(40)]
    fractions = sorted(design.fraction for design in designs)
    assert max(np.diff([0, *fractions, 1])) < 2 / 40 + 1e-9
    assert sum(design.local_steps == 1 for design in designs) == 20
    assert sum(design.server_steps == 0 for design in designs) == 20
    assert sum(design.is_skewed for design in designs) == 20
    alone = [design.rung_share for design in designs if max(design.rung_share) == 1]
    assert {share.index(1.0) for share in alone} == {0, 1, 2}
    assert 15 < len(alone) < 25


def test_what_a_round_was_made_of(calibrated: tuple[Config, Path]) -> None:
    _, folder = calibrated
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    log = log_of(rounds)
    assert isinstance(log, RoundLog)
    np.testing.assert_allclose(log.work.rung_share.sum(-1), 1)
    for line in rounds:
        assert line["local_steps"] == line["design"]["local_steps"]
        assert line["server_steps"] == line["design"]["server_steps"]
        assert (line["server_share"] > 0) == (line["server_steps"] > 0)
        assert line["staleness"] == line["round"] - 1
        assert 1 <= line["num_effective"] <= 4


def test_other_settings_do_not_go_on_with_a_calibration(calibrated: tuple[Config, Path]) -> None:
    config, folder = calibrated
    config = override(config, {"output_dir": str(folder.parent)})
    with pytest.raises(CheckpointError, match="it was begun with other settings"):
        calibrate(override(config, {"local": {"local_learning_rate": 0.5}}))


def test_a_calibration_needs_a_world(config: Config) -> None:
    with pytest.raises(ConfigError, match="world.preset must be given for a calibration, got None"):
        calibrate(override(config, {"world": {"preset": None}}))


def test_too_few_rounds_are_refused(config: Config) -> None:
    with pytest.raises(CalibrationError, match="must have at least 10 policies, got 2"):
        calibrate(override(config, {"calibration": {"num_federations": 2, "num_rounds": 1}}))


def test_no_controller_is_trained_on_a_fit_that_is_too_far_off(
    calibrated: tuple[Config, Path],
) -> None:
    config, folder = calibrated
    strict = override(config, {"calibration": {"max_error": 1e-6}})
    with pytest.raises(CalibrationError, match="error on held-out policies must be at most 1e-06"):
        learn(strict, folder)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("calibration.json", "{}", CheckpointError),
        ("calibration.json", None, CheckpointError),
        ("quality.json", "[", CalibrationError),
        ("rounds.jsonl", "{\n", CheckpointError),
    ],
)
def test_a_damaged_calibration_is_refused(
    name: str, content: str | None, error: type[Exception], calibrated: tuple[Config, Path]
) -> None:
    config, folder = calibrated
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(error, match=f"{name}"):
        goes_on(config, folder) if name == "rounds.jsonl" else world_of(config, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"controller": {"kind": "sabppo"}, "world": {"preset": None}},
            "world.preset must be given",
        ),
        ({"controller": {"kind": "sabppo"}}, "controller.policy must be given for controller.kind"),
        ({"federated": {"client_rungs": [0.5]}}, "federated.client_rungs must be empty in a simul"),
        ({"controller": {"local_steps": [4, 2]}}, "controller.local_steps must be rising"),
        ({"world": {"radius_m": float("nan")}}, "world.radius_m must be greater than 0, got nan"),
        ({"world": {"preset": "moon"}}, "world.preset must be one of iot, phone"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: Any, message: str, config: Config) -> None:
    with pytest.raises(ConfigError, match=message):
        override(config, changes)
