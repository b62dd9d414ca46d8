"""Same settings, same result (invariant 12); the best adapter is kept, not the last (8)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.experiments.evaluate import evaluate_adapter
from fedpeat.experiments.run import run
from outcomes import EVERYTHING_ON, PLAIN, assert_same, config_of, folder_of, lines_of, result_of

SETTINGS = {"plain": PLAIN, "everything on": EVERYTHING_ON}

# The learning rate rises over the first 20 steps to 1, which is far too much: rounds get worse.
TOO_FAST: dict[str, Any] = {
    "federated": {"num_rounds": 4},
    "local": {"local_learning_rate": 0.2, "warmup_steps": 20, "local_steps": 4},
}


def seed_everything(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002 - the global stream is what is meant
    torch.manual_seed(seed)


def random_states() -> list[Any]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    return [torch.get_rng_state().tolist(), repr(numpy_state)]


@dataclass(frozen=True)
class Made:
    """A run that is there, and the random states of its caller before and after it."""

    config: Config
    before: list[Any]
    after: list[Any]

    @property
    def result(self) -> dict[str, Any]:
        return result_of(folder_of(self.config))


@pytest.fixture(scope="module")
def made(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Made]:
    """Return a function of settings and the seed of a caller's random state; a run is made once."""

    @cache
    def once(name: str, seed: int) -> Made:
        config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("made"), SETTINGS[name])
        seed_everything(seed)
        before = random_states()
        run(config)
        return Made(config, before, random_states())

    return once


@pytest.mark.parametrize("name", SETTINGS)
def test_same_settings_same_bytes_whatever_the_callers_random_state(
    name: str, made: Callable[[str, int], Made]
) -> None:
    one, other = made(name, 1), made(name, 2)
    assert one.before != other.before
    assert_same(one.result, other.result)
    participants = [p for line in one.result["rounds"] for p in line["participants"]]
    assert {p["status"] for p in participants} <= {"accepted", "dropped"}
    assert {p["role"] for p in participants if p["status"] == "accepted"} == {"device", "server"}


def test_another_seed_gives_another_result(
    made: Callable[[str, int], Made], tmp_path: Path
) -> None:
    plain = made("plain", 1)
    run(override(plain.config, {"output_dir": str(tmp_path), "seed": 1}))
    one, other = plain.result, result_of(tmp_path / "tiny")
    assert one["adapter"] != other["adapter"]
    assert one["quality"] != other["quality"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_leaves_the_callers_random_state_alone(
    name: str, made: Callable[[str, int], Made]
) -> None:
    one = made(name, 1)
    assert one.after == one.before


# --- the best round -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worsening(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    """Return a run whose last round is worse than an earlier one, and its summary."""
    folder = tmp_path_factory.mktemp("worsening")
    config = config_of(model_dir, corpus_file, folder, TOO_FAST)
    return config, run(config)


def test_the_best_round_is_that_of_the_best_validation_quality(
    worsening: tuple[Config, dict[str, Any]],
) -> None:
    config, summary = worsening
    qualities = [line["quality"]["plug_in"] for line in lines_of(folder_of(config))]
    assert summary["best_round"] == int(np.argmin(qualities))
    assert 0 < summary["best_round"] < 4, f"nothing to tell apart: {qualities}"


def test_the_saved_adapter_is_that_of_the_best_round(
    worsening: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config, summary = worsening
    best_round = summary["best_round"]
    shorter = {"output_dir": str(tmp_path), "federated": {"num_rounds": best_round}}
    run(override(config, shorter))
    assert result_of(folder_of(config))["adapter"] == result_of(tmp_path / "tiny")["adapter"]
    newest = folder_of(config) / "checkpoints" / "round-00004" / "tensors.safetensors"
    tensors = load_file(newest)
    last = {n.removeprefix("adapter/"): a for n, a in tensors.items() if n.startswith("adapter/")}
    assert any((a != tensors[f"best/{name}"]).any() for name, a in last.items())


def test_the_summary_scores_the_best_rounds_adapter_not_the_last(
    worsening: tuple[Config, dict[str, Any]],
) -> None:
    config, summary = worsening
    folder = folder_of(config)
    best = lines_of(folder)[summary["best_round"]]["quality"]["plug_in"]
    again = evaluate_adapter(folder, split="validation")["perplexity"]
    assert again == pytest.approx(best, rel=1e-6)
    tested = evaluate_adapter(folder, split="test")["perplexity"]
    assert summary["quality"]["plug_in"] == pytest.approx(tested, rel=1e-6)


def test_a_resumed_run_still_has_the_adapter_of_its_best_round(
    worsening: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config, _ = worsening
    shutil.copytree(folder_of(config), tmp_path / "tiny")
    run(override(config, {"output_dir": str(tmp_path)}), resume=True)
    assert_same(result_of(folder_of(config)), result_of(tmp_path / "tiny"))


def test_where_no_round_makes_it_better_the_adapter_of_the_start_is_kept(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    # steps too small for float32 leave every round exactly as good as the start
    changes = {"local": {"local_learning_rate": 1e-30}, "federated": {"num_rounds": 2}}
    summary = run(config_of(model_dir, corpus_file, tmp_path, changes))
    assert summary["best_round"] == 0
    quality = summary["quality"]
    assert quality["plug_in"] == pytest.approx(quality["full_zero_shot"], rel=1e-6)


def test_rounds_that_are_not_evaluated_cannot_be_best(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    changes = {"evaluation": {"every": 3}, "federated": {"num_rounds": 4}}
    summary = run(config_of(model_dir, corpus_file, tmp_path, changes))
    lines = lines_of(tmp_path / "tiny")
    assert [line["quality"] is not None for line in lines] == [True, False, False, True, True]
    assert summary["best_round"] in {0, 3, 4}
