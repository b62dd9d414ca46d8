"""Whatever is wrong ends in one clear line and leaves nothing half-written; what is right works."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from disk import full_disk
from fedpeat.cli.main import main
from fedpeat.core.errors import ConfigError
from fedpeat.core.run_folder import RunFolder

Refused = Callable[..., str]
ConfigFile = Callable[..., Path]


@pytest.fixture
def finished(finished_run: Callable[[int], Path]) -> Path:
    """Return the folder of a finished run, of the test's own."""
    return finished_run(2)


# --- what is right ------------------------------------------------------------------------------


def test_run_then_evaluate_export_and_report_work(
    config_file: ConfigFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = tmp_path / "runs" / "tiny"
    main(["run", str(config_file(federated={"num_rounds": 2}))])
    shown = capsys.readouterr().out
    assert "1/2" in shown
    assert "2/2" in shown
    assert f"report: {finished / 'report.html'}" in shown
    main(["evaluate", str(finished)])
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
    quality = json.loads((finished / "summary.json").read_text())["quality"]
    assert float(scores["perplexity"]) == pytest.approx(quality["plug_in"], rel=1e-4)
    main(["export", str(finished), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    main(["report", str(finished)])
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"


def test_options_go_before_the_file(config_file: ConfigFile, tmp_path: Path) -> None:
    main(["run", str(config_file()), "--federated.num-rounds", "1", "--name", "other"])
    summary = json.loads((tmp_path / "runs" / "other" / "summary.json").read_text())
    assert summary["num_rounds"] == 1


def test_source_with_brackets_is_shown_as_it_is(
    config_file: ConfigFile, corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{corpus_file.parent}/[a-z]*.jsonl"
    main(["run", str(config_file(data={"source": source})), "--federated.num-rounds", "0"])
    assert f"reading data {source}\n" in capsys.readouterr().out


# --- what is wrong before anything runs ---------------------------------------------------------


def test_config_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refused("run", path) == f"no such config file: {path}"
    assert refused("compare", path) == f"no such config file: {path}"


def test_option_before_the_config_file(refused: Refused, config_file: ConfigFile) -> None:
    line = refused("run", "--seed", "1", config_file())
    assert line == "no such config file: 1; the file comes before the settings"


def test_unknown_key_in_the_config_file(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    path = config_file(local={"local_stepz": 3})
    hint = "did you mean local.local_steps?"
    assert refused("run", path) == f"{path}: unknown config key local.local_stepz; {hint}"
    assert not (tmp_path / "runs").exists()


def test_keep_ratio_out_of_range_in_the_file_and_on_the_command_line(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    message = "emulator.recipe 'greedy:1.5', character 8: greedy needs a ratio in (0, 1], got '1.5'"
    assert refused("run", config_file(), "--emulator.recipe", "greedy:1.5") == message
    path = config_file(emulator={"recipe": "greedy:1.5"})
    assert refused("run", path) == f"{path}: {message}"
    assert not (tmp_path / "runs").exists()


def test_comparison_of_an_unknown_method(refused: Refused, config_file: ConfigFile) -> None:
    line = refused("compare", config_file(), "--methods", "fedpaet")
    assert "compare.methods[0] must be one of fedpeat, " in line
    assert line.endswith("got 'fedpaet'; did you mean fedpeat?")


# --- what is wrong with the data or the model ---------------------------------------------------


def without_blocks(folder: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, folder, ignore=lambda _, names: {"model.safetensors", "config.json"})
    config = transformers.AutoConfig.from_pretrained(model_dir, num_hidden_layers=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def image_model(folder: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, folder, ignore=lambda _, names: {"model.safetensors", "config.json"})
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.ViTModel(config).save_pretrained(folder)


def cut_short(folder: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def without_weights(folder: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").unlink()


def with_a_broken_config(folder: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, folder)
    (folder / "config.json").write_text("{")


MODELS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "no folder": (lambda folder, _: None, "no such model folder: "),
    "empty folder": (lambda folder, _: folder.mkdir(), "cannot load model "),
    "a file": (lambda folder, _: folder.write_text("x"), "no such model folder: "),
    "image model": (image_model, "cannot load model "),
    "weights cut short": (cut_short, "cannot load model "),
    "no weights": (without_weights, "cannot load model "),
    "broken config": (with_a_broken_config, "cannot load "),
    "no block list": (without_blocks, "has no list of blocks"),
}


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_model_that_cannot_be_used(
    refused: Refused,
    config_file: ConfigFile,
    model_dir: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Any],
    message: str,
) -> None:
    make(tmp_path / "model", model_dir)
    line = refused("run", config_file(model={"name": str(tmp_path / "model")}))
    assert message in line
    assert not (tmp_path / "runs" / "tiny").exists()


def corpus(tmp_path: Path, text: str, **owners: int) -> str:
    """Write a corpus in which each owner has so many documents."""
    path = tmp_path / "corpus.jsonl"
    documents = [{"text": text, "owner": owner} for owner, n in owners.items() for _ in range(n)]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


SENTENCE = "the model never leaves its owner and the data never leaves theirs " * 3


def test_data_file_that_is_not_there(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    line = refused("run", config_file(data={"source": str(tmp_path / "none.jsonl")}))
    assert line == f"no such file: '{tmp_path}/none.jsonl'"
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', "{", "\x00\x00"])
def test_data_file_without_text(
    refused: Refused, config_file: ConfigFile, tmp_path: Path, content: str
) -> None:
    (tmp_path / "corpus.jsonl").write_text(content)
    line = refused("run", config_file(data={"source": str(tmp_path / "corpus.jsonl")}))
    assert "corpus.jsonl" in line
    assert not (tmp_path / "runs" / "tiny").exists()


def test_partition_with_an_empty_device(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    source = corpus(tmp_path, SENTENCE, a=40)
    changes = {"source": source, "partition": "dirichlet", "label_field": "owner", "alpha": 1e-6}
    line = refused("run", config_file(data={**changes, "num_clients": 4}))
    assert "left a client without any; raise data.alpha" in line
    assert not (tmp_path / "runs" / "tiny").exists()


def test_more_devices_than_documents(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    source = corpus(tmp_path, SENTENCE, a=40)
    line = refused(
        "run", config_file(data={"source": source, "partition": "iid", "num_clients": 99})
    )
    assert line.startswith("data.num_clients must be at most ")
    assert line.endswith(", got 99")


def test_device_with_less_text_than_a_block(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    source = corpus(tmp_path, SENTENCE, big=60)
    with Path(source).open("a") as file:
        file.writelines(json.dumps({"text": "its", "owner": "small"}) + "\n" for _ in range(3))
    line = refused("run", config_file(data={"source": source}))
    assert "'small' (" in line
    assert "one block of data.block_size 16" in line
    assert not (tmp_path / "runs" / "tiny").exists()


def test_block_longer_than_the_model_can_read(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    line = refused("run", config_file(data={"block_size": 65, "num_clients": 2}))
    assert line == "data.block_size must be at most 64, the model's longest input, got 65"
    assert not (tmp_path / "runs" / "tiny").exists()


def test_lora_on_a_module_that_the_model_does_not_have(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    line = refused("run", config_file(adapter={"target_modules": ["q_projj"]}))
    assert "adapter.target_modules has 'q_projj'" in line
    assert "allowed: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in line
    assert not (tmp_path / "runs" / "tiny").exists()


def test_more_tuned_blocks_than_the_model_has(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    line = refused("run", config_file(adapter={"num_bottom": 9}))
    assert line == "adapter.placement 'ends' wants 10 tuned blocks, the model has 6"
    assert not (tmp_path / "runs" / "tiny").exists()


# --- what is wrong with the run folder ----------------------------------------------------------


def test_folder_that_holds_a_run_is_not_overwritten_unasked(
    refused: Refused, finished: Path, config_file: ConfigFile
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    line = refused("run", config_file(federated={"num_rounds": 2}))
    assert line.startswith(f"{finished} already holds a run; ")
    assert "--resume" in line
    assert "--overwrite" in line
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_folder_of_somebody_else_is_left_alone(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    mine = tmp_path / "runs" / "tiny" / "checkpoints" / "mine"
    mine.mkdir(parents=True)
    assert "checkpoints of no run; choose another name" in refused("run", config_file())
    assert mine.exists()


def test_refused_run_can_be_started_again_once_its_input_is_right(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    refused("run", config_file(data={"source": str(tmp_path / "none.jsonl")}))
    main(["run", str(config_file(federated={"num_rounds": 0}))])
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


def test_overwrite_starts_anew(finished: Path, config_file: ConfigFile) -> None:
    (finished / "notes.txt").write_text("mine")
    main(["run", str(config_file(federated={"num_rounds": 1}, seed=3)), "--overwrite"])
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["num_rounds"], summary["seed"]) == (1, 3)
    assert (finished / "notes.txt").read_text() == "mine"


def test_overwriting_with_input_that_is_refused_leaves_the_old_run_as_it_was(
    refused: Refused, finished: Path, config_file: ConfigFile
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    refused("run", config_file(adapter={"target_modules": ["q_projj"]}), "--overwrite")
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_run_is_not_resumed_with_other_settings(
    refused: Refused, finished: Path, config_file: ConfigFile
) -> None:
    line = refused("run", config_file(seed=3), "--resume", "--local.local-steps", "5")
    changed = "seed (0 -> 3), local.local_steps (2 -> 5)"
    assert line == f"cannot resume {finished} with other settings: {changed}"


def test_run_is_resumed_past_a_damaged_checkpoint(
    finished: Path, config_file: ConfigFile, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = finished / "checkpoints" / "round-00002" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    capsys.readouterr()
    main(["run", str(config_file(federated={"num_rounds": 2})), "--resume"])
    assert "round-00002 is damaged" in capsys.readouterr().out
    rounds = (finished / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["server_round"] for line in rounds] == [0, 1, 2]


def test_run_with_every_checkpoint_damaged(
    refused: Refused, finished: Path, config_file: ConfigFile
) -> None:
    for tensors in finished.glob("checkpoints/*/tensors.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-1])
    line = refused("run", config_file(federated={"num_rounds": 2}), "--resume")
    folder = finished / "checkpoints"
    assert line == f"every checkpoint in {folder} is damaged; start anew with --overwrite"


def test_run_whose_config_is_damaged_is_not_resumed(
    refused: Refused, finished: Path, config_file: ConfigFile
) -> None:
    (finished / "config.yaml").write_text("{")
    assert "is not valid YAML" in refused("run", config_file(), "--resume")


def test_output_folder_that_is_a_file(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("")
    line = refused("run", config_file(), exit_code=1)
    assert line.startswith(f"cannot write {tmp_path}/runs/tiny: ")


def test_folder_in_use(refused: Refused, config_file: ConfigFile, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "runs" / "tiny")
    other.create()
    line = refused("run", config_file(), exit_code=1)
    assert line == f"{tmp_path}/runs/tiny is in use by another process"
    other.close()


def test_full_disk_while_checkpointing_costs_that_round_only(
    refused: Refused, config_file: ConfigFile, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    # With r = 128 a checkpoint has about 1 MB, and every other file less than 0.5 MB.
    path = config_file(adapter={"r": 128}, federated={"num_rounds": 1})
    main(["run", str(path)])
    more = ["run", path, "--resume", "--federated.num-rounds", "2"]
    with full_disk(600_000):
        line = refused(*more, exit_code=1)
    assert re.fullmatch(rf"cannot write {run}/checkpoints/round-00002: File too large", line)
    assert [p.name for p in run.glob("checkpoints/*")] == ["round-00001"]
    assert not [p for p in run.rglob(".*") if p.name != ".lock"]
    rounds = [json.loads(li) for li in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["server_round"] for line in rounds] == [0, 1]
    main([str(arg) for arg in more])
    assert json.loads((run / "summary.json").read_text())["num_rounds"] == 2


@pytest.mark.parametrize("kind", ["nothing", "empty", "file"])
@pytest.mark.parametrize("command", ["evaluate", "report", "export"])
def test_folder_that_holds_no_run(
    refused: Refused, tmp_path: Path, command: str, kind: str
) -> None:
    folder = tmp_path / "folder"
    {"nothing": lambda: None, "empty": folder.mkdir, "file": folder.touch}[kind]()
    out = [tmp_path / "out"] if command == "export" else []
    line = refused(command, folder, *out)
    assert str(folder) in line
    assert "run folder" in line
    assert not (tmp_path / "out").exists()
    assert not folder.is_dir() or not any(folder.iterdir())


def test_run_without_an_adapter_yet(refused: Refused, finished: Path, tmp_path: Path) -> None:
    shutil.rmtree(finished / "adapter")
    assert "adapter" in refused("evaluate", finished)
    assert "finish the run with --resume" in refused("export", finished, tmp_path / "out")


def test_export_does_not_write_over_anything(
    refused: Refused, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    line = refused("export", finished, tmp_path / "out")
    assert line == f"export folder must not exist yet or be empty, got {tmp_path}/out"


# --- how a command ends -------------------------------------------------------------------------


def test_debug_shows_where_an_error_comes_from(config_file: ConfigFile) -> None:
    with pytest.raises(ConfigError):
        main(["run", str(config_file(seed=-1)), "--debug"])


@pytest.mark.parametrize(
    ("fault", "line", "exit_code"),
    [
        (RuntimeError("a\nb"), "error: RuntimeError: a (--debug shows where)", 1),
        (MemoryError(), "error: MemoryError: MemoryError (--debug shows where)", 1),
        (OSError(28, "No space left", "x"), "error: No space left (x)", 1),
        (OSError("odd"), "error: odd", 1),
        (KeyboardInterrupt(), "interrupted; go on with --resume", 130),
    ],
)
def test_fault_of_a_run_is_one_line_without_a_traceback(
    config_file: ConfigFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: BaseException,
    line: str,
    exit_code: int,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("fedpeat.experiments.run.run", fails)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(config_file())])
    assert ended.value.code == exit_code
    assert capsys.readouterr().err == f"{line}\n"


def test_ctrl_c_ends_a_run_with_a_hint_and_the_run_can_go_on(
    config_file: ConfigFile, tmp_path: Path
) -> None:
    path, run = config_file(federated={"num_rounds": 100_000}), tmp_path / "runs" / "tiny"
    listening = (  # a shell that started the tests in the background has Ctrl-C ignored
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('fedpeat', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", listening, "run", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "round-00002").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted; go on with --resume\n")
    newest = RunFolder(run).latest_checkpoint(pytest.fail)
    assert newest is not None
    num_rounds = newest.server_round + 1
    main(["run", str(path), "--resume", "--federated.num-rounds", str(num_rounds)])
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["server_round"] for line in rounds] == list(range(num_rounds + 1))
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["federated"]["num_rounds"] == num_rounds
    )
