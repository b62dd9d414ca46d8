"""Image classification: the main job, with accuracy as its metric."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console

from fedpeat.cli.main import main
from fedpeat.cli.terminal import Terminal
from fedpeat.config.loading import config_from_dict, config_to_yaml, override
from fedpeat.config.schema import ComparisonPlan, Config
from fedpeat.core.errors import AdapterError, DataError, FedPEATError, ModelError
from fedpeat.data.image_federation import load_federated_images
from fedpeat.experiments.compare import compare
from fedpeat.experiments.evaluate import evaluate_adapter
from fedpeat.experiments.export import export_adapter
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.results import gap_closed, mean_summary
from fedpeat.experiments.run import run
from fedpeat.report.quantities import quality_text
from fedpeat.tuning.evaluation import Quality, evaluate
from outcomes import EVERYTHING_ON, assert_same, folder_of, lines_of, result_of
from tiny import CLASSES, tiny_image_settings, tiny_settings

LONGER: dict[str, Any] = {"federated": {"num_rounds": 6}, "local": {"local_steps": 6}}
RECIPE = "greedy:0.5+width:0.6+distill:64+int8"


@pytest.fixture
def config(vit_dir: Path, images_dir: Path, tmp_path: Path) -> Config:
    return config_from_dict(tiny_image_settings(vit_dir, images_dir, tmp_path))


@pytest.fixture(scope="module")
def finished(
    vit_dir: Path, images_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    """Return a run with its upper bound, and its summary."""
    folder = tmp_path_factory.mktemp("finished")
    config = config_from_dict(tiny_image_settings(vit_dir, images_dir, folder))
    changes = {"evaluation": {"full_tuned": True}, "emulator": {"recipe": RECIPE}}
    longer = override(override(config, LONGER), changes)
    return longer, run(longer)


# --- what a run says ----------------------------------------------------------------------------


def test_tuning_raises_the_accuracy_on_held_out_images(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    quality = finished[1]["quality"]
    assert quality["metric"] == "accuracy"
    assert quality["plug_in"] > quality["full_zero_shot"] + 0.2


def test_the_gap_closed_is_that_of_the_accuracies(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    quality = finished[1]["quality"]
    start, reached, bound = (quality[n] for n in ("full_zero_shot", "plug_in", "full_tuned"))
    assert quality["gap_closed"] == pytest.approx((reached - start) / (bound - start))
    assert gap_closed(0.5, 0.7, 0.75, "accuracy") == pytest.approx(0.8)
    assert gap_closed(0.5, 0.7, 0.5, "accuracy") is None


def test_cross_entropy_stands_beside_every_accuracy(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    config, summary = finished
    quality = summary["quality"]
    assert quality["cross_entropy"].keys() == quality.keys() - {
        "metric",
        "gap_closed",
        "cross_entropy",
    }
    assert all(value > 0 for value in quality["cross_entropy"].values())
    lines = lines_of(folder_of(config))
    assert {line["quality"]["metric"] for line in lines} == {"accuracy"}
    assert all(line["quality"]["plug_in_cross_entropy"] > 0 for line in lines)


def test_the_best_round_is_that_of_the_highest_accuracy(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    config, summary = finished
    scores = [line["quality"]["plug_in"] for line in lines_of(folder_of(config))]
    assert summary["best_round"] == scores.index(max(scores)) > 0


def test_an_image_counts_as_one_in_budgets_and_costs(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    summary = finished[1]
    assert summary["cost"]["num_tokens"] == 4 * 6 * 6 * 4  # participants, rounds, steps, images


def test_the_emulators_fidelity_is_told_in_accuracy(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    fidelity = finished[1]["emulator"]["fidelity"]
    assert 0 <= fidelity["accuracy"] <= 1
    assert fidelity["hidden_error"] < fidelity["hidden_error_before"]


def test_the_emulator_is_compared_with_the_full_model_and_its_gradients(
    finished: tuple[Config, dict[str, Any]],
) -> None:
    fidelity = finished[1]["emulator"]["fidelity"]
    shares = ("hidden_relative_error", "hidden_cosine", "top1_agreement")
    for name in (*shares, "gradient_cosine", "gradient_cosine_tuned"):
        assert 0 < fidelity[name] < 1
    assert fidelity["logit_kl"] > 0


def test_the_page_reads_right(finished: tuple[Config, dict[str, Any]]) -> None:
    config, summary = finished
    page = (folder_of(config) / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    reached = quality_text(summary["quality"]["plug_in"], "accuracy", 3)
    assert f"<h1>Plug-in accuracy {reached}, up from" in page
    for text in ("Accuracy: higher is better", ">Cross-entropy<", "examples/s", ">Examples seen<"):
        assert text in page
    for text in (">Tokens<", "tokens/s", "Perplexity per token"):
        assert text not in page


def test_the_terminal_reads_right(finished: tuple[Config, dict[str, Any]]) -> None:
    config, summary = finished
    terminal = Terminal()
    terminal._console = Console(width=120, record=True, quiet=False)  # noqa: SLF001
    for line in lines_of(folder_of(config))[1:3]:
        terminal.round(line, 6)
    terminal.summary(summary, folder_of(config))
    shown = terminal._console.export_text()  # noqa: SLF001
    for text in ("plug-in acc", "accuracy on the test split", "cross-entropy"):
        assert text in shown
    assert f"{summary['quality']['plug_in']:.2%}" in shown
    assert "per token" not in shown


def test_an_average_over_devices_is_of_the_accuracies_themselves() -> None:
    def summary(accuracy: float) -> dict[str, Any]:
        names = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")
        quality = {"metric": "accuracy", **dict.fromkeys(names, accuracy)}
        costs = ("bytes_down", "bytes_up", "num_tokens", "wall_seconds", "peak_rss_bytes")
        beside = dict.fromkeys(names, 1.0)
        cost = dict.fromkeys(costs, 1)
        both = {**quality, "cross_entropy": beside}
        return {"quality": both, "cost": cost, "rungs": [], "privacy": None}

    assert mean_summary([summary(0.0), summary(0.5)])["quality"]["plug_in"] == 0.25


def test_numbers_worked_by_hand() -> None:
    quality = Quality(nll=6.0, num_tokens=4, num_bytes=0, num_correct=3)
    assert (quality.accuracy, quality.cross_entropy) == (0.75, 1.5)


# --- every method and adapter -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fed_eat", "fed_ft", "centralized", "local"])
def test_every_method_runs_on_images(config: Config, method: str) -> None:
    summary = run(override(config, {"method": method, "federated": {"num_rounds": 1}}))
    assert 0 <= summary["quality"]["plug_in"] <= 1
    per_participant = 2 * 4
    assert summary["cost"]["num_tokens"] == {"local": 3}.get(method, 4) * per_participant


def test_a_prompt_is_for_text_alone(config: Config) -> None:
    with pytest.raises(AdapterError, match="adapter.method 'prompt' .* a language model, got ViT"):
        run(override(config, {"adapter": {"method": "prompt"}}))


def test_methods_are_compared_by_accuracy(config: Config, tmp_path: Path) -> None:
    plan = ComparisonPlan(methods=("zero_shot", "fedpeat"), seeds=(0,))
    short = override(config, {"federated": {"num_rounds": 1}, "name": "both"})
    for method in plan.methods:  # what is there is not run again
        own = {"method": method, "name": f"{method}-seed0", "output_dir": str(tmp_path / "both")}
        run(override(short, own))
    folder, table = compare(short, plan)
    data = json.loads((folder / "comparison.json").read_text())
    assert data["metric"] == "accuracy"
    assert "| Plug-in (accuracy) | Cross-entropy |" in table
    assert "| Examples |" in table
    assert "accuracy, higher is better" in table


# --- a ladder of emulators ----------------------------------------------------------------------

LADDER: dict[str, Any] = {
    "emulator": {"recipe": "layer_drop:0.75+distill:64", "lower_rungs": (0.25,)},
    "federated": {"client_rungs": (0.75, 0.25), "num_rounds": 2},
}


@pytest.mark.parametrize("rank", [0, 2])
def test_devices_on_several_rungs_tune_one_adapter_and_rungs_are_aligned_anew(
    config: Config, rank: int
) -> None:
    anew = {"server": {"realign_every": 1, "realign_rank": rank, "realign_tokens": 32}}
    summary = run(override(override(config, LADDER), anew))
    assert {rung["name"]: rung["num_clients"] for rung in summary["rungs"]} == {
        "0.75": 2,
        "0.25": 1,
    }
    assert all("accuracy" in rung["fidelity"] for rung in summary["rungs"])
    first, second = lines_of(folder_of(config))[1:]
    assert first["refresh_bytes"] == {}
    assert all(second["refresh_bytes"][name] > 0 for name in ("0.75", "0.25"))
    assert {part["status"] for part in second["participants"]} == {"accepted"}


def test_an_image_model_cannot_be_audited(
    finished: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(finished[0])
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(folder), "--public-text", "server"])
    assert ended.value.code == FedPEATError.exit_code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"error: {folder}: only emulators of language models can be audited; model.task must be "
        "causal_lm, got image_classification"
    )
    assert not (folder / "audit.json").exists()


# --- what is exported ---------------------------------------------------------------------------


def test_evaluating_the_exported_adapter_gives_the_summarys_numbers(
    finished: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, summary = finished
    quality = summary["quality"]
    assert evaluate_adapter(folder_of(config)) == {
        "accuracy": quality["plug_in"],
        "cross_entropy": quality["cross_entropy"]["plug_in"],
    }
    main(["evaluate", str(folder_of(config))])
    assert f"accuracy {quality['plug_in']}\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_and_transformers_alone_load_adapter_and_merged_model(
    finished: tuple[Config, dict[str, Any]], vit_dir: Path, tmp_path: Path
) -> None:
    config, summary = finished
    export_adapter(folder_of(config), tmp_path / "merged", merged=True)
    auto = transformers.AutoModelForImageClassification
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    test = load_federated_images(config.data, processor, dict(enumerate(CLASSES)), 1, 0).test
    adapter = folder_of(config) / "adapter"
    tuned = peft.PeftModel.from_pretrained(auto.from_pretrained(vit_dir), adapter)
    for model in (auto.from_pretrained(tmp_path / "merged"), tuned):
        quality = evaluate(model, test, 16)
        assert quality.accuracy == summary["quality"]["plug_in"]
        expected = summary["quality"]["cross_entropy"]["plug_in"]
        assert quality.cross_entropy == pytest.approx(expected, rel=1e-4)


# --- the same result ----------------------------------------------------------------------------


def test_same_settings_same_bytes_whatever_the_callers_random_state(
    config: Config, tmp_path: Path
) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        changed = override(
            override(config, EVERYTHING_ON), {"output_dir": str(tmp_path / str(seed))}
        )
        run(override(changed, {"emulator": {"recipe": RECIPE}}))
        results.append(result_of(tmp_path / str(seed) / "tiny"))
    assert_same(*results)


class _StopsAfter(Silent):
    """Ends the process's work after a round, as a signal would."""

    def __init__(self, server_round: int) -> None:
        self._server_round = server_round

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        if line["server_round"] == self._server_round:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_ends_bit_identical(config: Config, tmp_path: Path) -> None:
    config = override(config, EVERYTHING_ON)
    whole = override(config, {"output_dir": str(tmp_path / "whole")})
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=_StopsAfter(2))
    run(config, resume=True)
    assert_same(result_of(folder_of(whole)), result_of(folder_of(config)))


# --- text for images, images for text -----------------------------------------------------------


def test_a_model_that_does_something_else_is_refused(
    vit_dir: Path, model_dir: Path, corpus_file: Path, images_dir: Path, tmp_path: Path
) -> None:
    text = tiny_settings(vit_dir, corpus_file, tmp_path)
    with pytest.raises(ModelError, match="'vit' network, which AutoModelForCausalLM does not know"):
        run(config_from_dict(text))
    images = tiny_image_settings(model_dir, images_dir, tmp_path)
    with pytest.raises(ModelError, match="'llama' network, .*ImageClassification does not know"):
        run(config_from_dict(images))


def test_data_of_the_other_kind_is_refused(
    vit_dir: Path, model_dir: Path, corpus_file: Path, images_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="corpus.jsonl: has no images; model.task image_class"):
        run(config_from_dict(tiny_image_settings(vit_dir, corpus_file, tmp_path)))
    with pytest.raises(DataError, match="no file of a known format.* model.task image_classifi"):
        run(config_from_dict(tiny_settings(model_dir, images_dir, tmp_path)))
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(b"")
    with pytest.raises(DataError, match="format must be one of .* model.task image_classification"):
        run(config_from_dict(tiny_settings(model_dir, archive, tmp_path)))


def test_a_model_without_image_processor_is_refused(
    config: Config, vit_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    transformers.ViTForImageClassification.from_pretrained(vit_dir).save_pretrained(bare)
    with pytest.raises(ModelError, match="cannot load an image processor for"):
        run(override(config, {"model": {"name": str(bare)}}))


def test_a_damaged_image_ends_the_command_in_one_line(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "images" / "dot"
    broken.mkdir(parents=True)
    (broken / "1.png").write_text("hello")
    settings = tmp_path / "a.yaml"
    settings.write_text(config_to_yaml(override(config, {"data": {"source": str(broken.parent)}})))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(settings)])
    assert ended.value.code == FedPEATError.exit_code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {broken.parent}: dot/1.png: is no image that can be read (")
    assert not folder_of(config).exists()
