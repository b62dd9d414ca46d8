"""An audit from a run folder to its files, on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import AuditPlan
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.documents import Document
from fedpeat.data.federation import load_federated_documents
from fedpeat.data.files import read_local_documents
from fedpeat.data.packing import pack
from fedpeat.data.records import Fields
from fedpeat.experiments import audit_inputs
from fedpeat.experiments.audit import (
    _best_quality,
    _earlier,
    _regained,
    audit,
    capability_ratio,
)
from fedpeat.experiments.audit_inputs import audit_text, find_suspects
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.run import run
from fedpeat.experiments.verdicts import verdicts
from fedpeat.model.loading import load_model, load_tokenizer
from fedpeat.tuning.evaluation import Quality
from fedpeat.tuning.recovery import Budget, Reached, recover
from tiny import BLOCK_SIZE, tiny_settings

PLAN = AuditPlan(public_text="server", num_tokens=512, batch_size=4, learning_rates=(3e-3,))

QUICK = AuditPlan(public_text="server", num_tokens=64, batch_size=4, learning_rates=(3e-3,))


@pytest.fixture(scope="module")
def able_model(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a model that knows the words of the corpus, so that there is something to recover."""
    folder = tmp_path_factory.mktemp("model") / "able"
    shutil.copytree(model_dir, folder)
    loaded = load_model(str(model_dir), device="cpu")
    text = pack(
        read_local_documents(str(corpus_file), Fields("text")), loaded.processor, BLOCK_SIZE
    )
    loaded.model.requires_grad_(True)
    budget = Budget(60 * 8 * BLOCK_SIZE, 8, 5e-3)
    recover(loaded.model, text, text.head(2), budget, seed=0, progress=lambda *_: None)
    loaded.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(
    able_model: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    settings = config_from_dict(tiny_settings(able_model, corpus_file, folder))
    run(override(settings, {"federated": {"num_rounds": 1}}))
    return folder / "tiny"


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run."""
    return Path(shutil.copytree(run_folder, tmp_path / "tiny"))


def quality(perplexity: float) -> Quality:
    return Quality(10 * math.log(perplexity), 10, 20)


def test_capability_ratio_worked_by_hand() -> None:
    random, full = quality(1000.0), quality(10.0)
    assert capability_ratio(quality(100.0), random, full) == pytest.approx(0.5)
    assert capability_ratio(random, random, full) == 0
    assert capability_ratio(full, random, full) == 1
    assert capability_ratio(quality(10_000.0), random, full) == pytest.approx(-0.5)
    assert capability_ratio(quality(5.0), full, full) is None
    assert capability_ratio(Quality(math.nan, 10, 20), random, full) is None


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    found = [Reached(0, Quality(math.nan, 10, 20)), Reached(64, quality(9.0))]
    assert _best_quality(found) == quality(9.0)


def test_an_audit_has_every_key_of_the_interface_and_its_numbers_agree(folder: Path) -> None:
    results, page = audit([folder], PLAN)
    assert page is None
    written = json.loads((folder / "audit.json").read_text())
    assert written == json.loads(json.dumps(results[0]))
    assert written.keys() == {
        "schema", "metric", "model", "num_parameters", "settings", "public_text", "held_out",
        "emulators", "wall_seconds", "versions",
    }  # fmt: skip
    (emulator,) = written["emulators"]
    assert emulator.keys() == {
        "name", "recipe", "sha256", "num_parameters", "num_bytes", "fidelity", "verbatim",
        "capability", "attacks", "recovered_ratio", "verdicts",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    capability, attacks = emulator["capability"], emulator["attacks"]
    assert capability["full"] == pytest.approx(summary["quality"]["full_zero_shot"], rel=1e-5)
    untouched = summary["quality"]["emulator_zero_shot"]
    assert capability["emulator"] == pytest.approx(untouched, rel=1e-5)
    # the emulator has 2 of 4 middle blocks, and all else, as it is
    block = (written["num_parameters"] - emulator["num_parameters"]) / 2
    equal = 1 - 2 * block / written["num_parameters"]
    assert emulator["verbatim"]["equal_ratio"] == pytest.approx(equal)
    starts = {name: attack["curve"][0]["perplexity"] for name, attack in attacks.items()}
    assert starts["from_scratch"] == capability["random"]
    assert starts["fine_tune"] == pytest.approx(untouched, rel=1e-5)
    assert len(set(starts.values())) == 3
    for attack in attacks.values():
        assert [point["num_tokens"] for point in attack["curve"]] == [0, 128, 256, 512]
        assert attack["perplexity"] == min(point["perplexity"] for point in attack["curve"])
    best = max(attacks[name]["recovered_ratio"] for name in ("fine_tune", "reinsert"))
    assert 0 < emulator["recovered_ratio"] == best < 1
    assert emulator["fidelity"] == summary["emulator"]["fidelity"]
    assert {"gradient_cosine", "logit_kl"} <= emulator["fidelity"].keys()


def test_the_same_audit_gives_the_same_numbers_and_is_not_made_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = audit([folder], QUICK)[0][0]
    again = audit([folder / "emulator"], QUICK, overwrite=True)[0][0]
    assert again["emulators"] == first["emulators"]
    assert not (folder / "emulator" / "audit.json").exists()

    def not_again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("fedpeat.experiments.audit.load_full_model", not_again)
    assert audit([folder], QUICK)[0][0]["emulators"] == first["emulators"]
    with pytest.raises(AssertionError):
        audit([folder], AuditPlan(public_text="server", num_tokens=256))


def test_an_audit_changes_nothing_else_in_the_folder_but_the_report(folder: Path) -> None:
    def content() -> dict[Path, bytes]:
        files = [p for p in folder.rglob("*") if p.is_file()]
        return {p: p.read_bytes() for p in files if p.name not in {"audit.json", "report.html"}}

    before = content()
    audit([folder], QUICK)
    assert content() == before
    assert "What the emulator gives away" in (folder / "report.html").read_text()


def test_several_runs_get_a_chart_and_a_table(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    _, page = audit([folder, other], QUICK, out=tmp_path / "new")
    assert page == tmp_path / "new" / "audit.html"
    table = (tmp_path / "new" / "audit.md").read_text()
    assert "| **tiny** |" in table
    assert "| **other** |" in table


def test_what_cannot_be_set_side_by_side_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each run can be named once"):
        audit([folder, folder / "emulator"], QUICK)
    alone = Path(shutil.copytree(folder / "emulator", tmp_path / "elsewhere" / "mine"))
    with pytest.raises(ConfigError, match="several emulators must each be of a run"):
        audit([folder, alone], QUICK, model="bundled")
    assert not (folder / "audit.json").exists()


def test_each_rung_of_a_run_is_audited(folder: Path) -> None:
    rungs = folder / "rungs"
    (folder / "emulator").rename(rungs)
    for name in ("large", "small"):
        shutil.copytree(rungs, folder / "emulator" / name)
    (result,), _ = audit([folder], QUICK)
    assert [emulator["name"] for emulator in result["emulators"]] == ["large", "small"]
    one = find_suspects(folder / "emulator" / "small")
    assert (list(one.packages), one.home) == (["small"], folder)


def test_an_emulator_without_a_run_is_measured_on_held_out_public_text(
    folder: Path, model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(folder / "emulator", tmp_path / "elsewhere" / "mine"))
    with pytest.raises(ConfigError, match="is of no run; name the full model with --model"):
        find_suspects(alone)
    suspect = find_suspects(alone, str(model_dir))
    assert (suspect.home, suspect.is_run) == (alone, False)
    tokenizer = load_tokenizer(str(model_dir))
    plan = AuditPlan(public_text=str(corpus_file))
    text = audit_text(suspect, plan, tokenizer, Silent())
    assert text.held_out_name == "held out from the public text"
    assert text.public.num_tokens > 5 * text.held_out.num_tokens > 0
    with pytest.raises(DataError, match="--public-text server needs a run whose server has text"):
        audit_text(suspect, PLAN, tokenizer, Silent())


def test_no_document_that_is_measured_on_is_in_the_attackers_text(
    folder: Path, model_dir: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[Document] = []

    def watched(documents: list[Document], *rest: Any) -> Any:
        packed.extend(documents)
        return pack(documents, *rest)

    monkeypatch.setattr(audit_inputs, "pack", watched)
    suspect = find_suspects(folder)
    plan = AuditPlan(public_text=str(corpus_file))  # what the run itself is made of
    audit_text(suspect, plan, load_tokenizer(str(model_dir)), Silent())
    config = suspect.config
    test = load_federated_documents(config.data, config.seed).test
    assert len(packed) == 240 - len(test)
    assert not {d.text for d in packed} & {d.text for d in test}


def test_a_learning_rate_that_fails_is_passed_over_if_another_works(folder: Path) -> None:
    heard: list[str] = []

    class Listener(Silent):
        def message(self, text: str) -> None:
            heard.append(text)

    rates = AuditPlan(
        public_text="server", num_tokens=256, batch_size=4, learning_rates=(1e30, 3e-3)
    )
    attacks = audit([folder], rates, observer=Listener())[0][0]["emulators"][0]["attacks"]
    assert [attack["learning_rate"] for attack in attacks.values()] == [3e-3] * 3
    assert sum("loss is not finite" in line for line in heard) == 3


def test_a_quality_that_is_not_finite_is_never_the_best(folder: Path) -> None:
    # one step, after which the weights are of no use, but the loss that was seen is finite
    plan = AuditPlan(public_text="server", num_tokens=64, batch_size=4, learning_rates=(1e30, 1e-3))
    (emulator,) = audit([folder], plan)[0][0]["emulators"]
    fine_tuned = emulator["attacks"]["fine_tune"]
    assert fine_tuned["learning_rate"] == 1e-3
    alone = AuditPlan(public_text="server", num_tokens=64, batch_size=4, learning_rates=(1e30,))
    (emulator,) = audit([folder], alone)[0][0]["emulators"]
    fine_tuned = emulator["attacks"]["fine_tune"]
    assert fine_tuned["perplexity"] == fine_tuned["curve"][0]["perplexity"]
    assert fine_tuned["regained_ratio"] == 0


def test_what_an_emulator_as_good_as_the_model_regains_is_not_told(folder: Path) -> None:
    def quality(perplexity: float) -> Quality:
        return Quality(nll=math.log(perplexity), num_tokens=1, num_bytes=1, num_correct=0)

    full, scratch, best = quality(10.0), quality(1000.0), quality(9.9)
    assert _regained(best, quality(10.3), scratch, full) is None
    assert _regained(best, quality(9.8), scratch, full) is None
    assert _regained(best, quality(1000.0), quality(5.0), full) is None
    found = _regained(quality(11.0), quality(12.0), scratch, full)
    assert found == pytest.approx(math.log(12 / 11) / math.log(12 / 10))


def test_a_damaged_audit_is_made_anew(folder: Path) -> None:
    for damaged in ("{", "[]", '{"emulators": [{}]}'):
        (folder / "audit.json").write_text(damaged)
        assert _earlier(folder / "audit.json", find_suspects(folder), QUICK) is None
    assert audit([folder], QUICK)[0][0]["emulators"]
    assert json.loads((folder / "audit.json").read_text())["schema"] == 1


def test_verdicts_follow_the_numbers() -> None:
    curve = [{"num_tokens": 0}, {"num_tokens": 2000}]
    record: dict[str, Any] = {
        "verbatim": {"equal_ratio": 0.25, "near_ratio": 0.5, "near_distance": 0.05},
        "capability": {"full": 10.0, "leaked_ratio": -0.1},
        "recovered_ratio": 0.6,
        "attacks": {
            "from_scratch": {"perplexity": 99.0, "recovered_ratio": None},
            "fine_tune": {
                "perplexity": 20.0, "recovered_ratio": 0.6, "regained_ratio": 0.3, "curve": curve
            },
            "reinsert": None,
        },
    }  # fmt: skip
    equal, untouched, attack = verdicts(record, PLAN)
    assert "25 % of the full model's parameters" in equal
    assert "50 % up to a relative distance of 0.05" in equal
    assert "-10 % of the way" in untouched
    assert "up to 2,000 tokens of public text (server), fine-tuning the emulator" in attack
    assert "60 % of the way is recovered, and 30 % of what compression had taken" in attack
    record["attacks"]["fine_tune"]["regained_ratio"] = None
    attack = verdicts(record, PLAN)[2]
    assert "60 % of the way is recovered, where compression had taken next to nothing" in attack
    for ratio, meaning in (
        (0.95, "nearly all"),
        (0.6, "most"),
        (0.2, "part"),
        (0.0, "gains little"),
    ):
        record["recovered_ratio"] = record["attacks"]["fine_tune"]["recovered_ratio"] = ratio
        assert meaning in verdicts(record, PLAN)[-1]
    record["recovered_ratio"] = None
    assert "cannot be told" in verdicts(record, PLAN)[-1]
