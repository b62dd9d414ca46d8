"""The run folder survives kills, full disks and damage."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disk import full_disk
from fedpeat.core.errors import CheckpointError, ConfigError, StorageError
from fedpeat.core.run_folder import (
    Checkpoint,
    RunFolder,
    clean_json,
    replace_folder,
    sha256_of_file,
    storage_errors,
    write_atomically,
)


def checkpoint(server_round: int, num_values: int = 4) -> Checkpoint:
    arrays = {"adapter/w": np.full(num_values, server_round, np.float32)}
    return Checkpoint(server_round, arrays, {"history": [{"server_round": server_round}]})


def strict(text: str) -> Any:
    """Parse JSON as every other language does: without NaN."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in {".tmp", ".old"}]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    run_folder = RunFolder(tmp_path / "run")
    run_folder.create()
    yield run_folder
    run_folder.close()


# --- files ------------------------------------------------------------------------------------


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "ü\n")
    write_atomically(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "ü\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with full_disk(1000), pytest.raises(StorageError, match="cannot write .*summary.json: "):
        write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_ctrl_c_while_a_file_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_folder_that_is_not_there_is_a_storage_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write .*/none/x: No such file or directory"):
        write_atomically(tmp_path / "none" / "x", "text")


def test_storage_errors_names_the_outer_path_only_once(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "outer"):
        write_atomically(tmp_path / "none" / "inner", "text")
    assert "inner" in str(caught.value)
    assert "outer" not in str(caught.value)


def test_replaced_folder_holds_the_new_files_only(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with replace_folder(tmp_path / "adapter") as temporary:
            (temporary / name).write_text(name)
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, OSError])
def test_folder_stays_as_it_was_where_filling_its_successor_fails(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    with replace_folder(tmp_path / "adapter") as temporary:
        (temporary / "file").write_text("old")
    expected = StorageError if fault is OSError else fault
    with pytest.raises(expected), replace_folder(tmp_path / "adapter") as temporary:  # noqa: PT012
        (temporary / "file").write_text("new")
        raise fault
    assert (tmp_path / "adapter" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_folder_left_half_filled_by_a_kill_is_not_mixed_into_the_next(tmp_path: Path) -> None:
    (tmp_path / ".adapter.tmp").mkdir()
    (tmp_path / ".adapter.tmp" / "stale").write_text("x")
    with replace_folder(tmp_path / "adapter") as temporary:
        (temporary / "file").write_text("new")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["file"]


def test_sha256_of_a_file_matches_a_known_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "x") == expected


# --- metrics and summary ------------------------------------------------------------------------


def test_numbers_that_are_not_finite_become_null_at_any_depth() -> None:
    value = {"a": float("nan"), "b": [1.5, (np.float64("inf"), {"c": -np.inf})], "d": "NaN"}
    assert strict(clean_json(value)) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": "NaN"}


def test_metrics_are_a_line_per_round_without_nan(folder: RunFolder) -> None:
    folder.write_metrics([{"server_round": 0, "loss": float("nan")}, {"server_round": 1}])
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [
        {"server_round": 0, "loss": None},
        {"server_round": 1},
    ]


def test_summary_has_no_nan_and_ends_with_a_newline(folder: RunFolder) -> None:
    folder.write_summary({"quality": {"plug_in": float("inf")}})
    text = (folder.path / "summary.json").read_text()
    assert strict(text) == {"quality": {"plug_in": None}}
    assert text.endswith("}\n")


# --- checkpoints --------------------------------------------------------------------------------


def test_checkpoint_comes_back_bit_for_bit(folder: RunFolder) -> None:
    arrays: dict[str, np.ndarray] = {
        "w": np.array([np.nan, -0.0, 1e-45], np.float32),
        "scalar": np.array(3, np.int64),
    }
    state = {"rng": 2**127, "loss": float("inf"), "held": {"client-ü": ["e"]}}
    folder.save_checkpoint(Checkpoint(7, arrays, state))
    back = folder.latest_checkpoint(pytest.fail)
    assert back is not None
    assert (back.server_round, back.state) == (7, state)
    assert {n: (a.shape, a.dtype, a.tobytes()) for n, a in back.arrays.items()} == {
        n: (a.shape, a.dtype, a.tobytes()) for n, a in arrays.items()
    }


def test_there_is_no_checkpoint_before_the_first(folder: RunFolder) -> None:
    assert folder.latest_checkpoint(pytest.fail) is None


def test_only_the_two_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    for server_round in (8, 9, 10, 11):
        folder.save_checkpoint(checkpoint(server_round))
    kept = sorted(path.name for path in folder.checkpoints.iterdir())
    assert kept == ["round-00010", "round-00011"]


def test_round_100000_comes_after_99999(folder: RunFolder) -> None:
    for server_round in (99_998, 99_999, 100_000, 100_001):
        folder.save_checkpoint(checkpoint(server_round))
    newest = folder.latest_checkpoint(pytest.fail)
    assert newest is not None
    assert newest.server_round == 100_001


def cut(name: str) -> Callable[[Path], object]:
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[:-1])


def flip(name: str) -> Callable[[Path], object]:
    def damage(f: Path) -> None:
        data = bytearray((f / name).read_bytes())
        data[-3] ^= 1
        (f / name).write_bytes(bytes(data))

    return damage


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda f: (f / name).write_bytes(content)


def lose(name: str) -> Callable[[Path], object]:
    return lambda f: (f / name).unlink()


def a_file_instead(f: Path) -> None:
    shutil.rmtree(f)
    f.write_text("")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "tensors cut short": cut("tensors.safetensors"),
    "tensors flipped": flip("tensors.safetensors"),
    "tensors lost": lose("tensors.safetensors"),
    "state cut short": cut("state.json"),
    "state flipped": flip("state.json"),
    "state empty": put("state.json", b""),
    "seal lost": lose("seal.json"),
    "seal cut short": cut("seal.json"),
    "seal of nothing": put("seal.json", b"null"),
    "seal not text": put("seal.json", b"\xff\xfe"),
    "seal a bomb": put("seal.json", b"[" * 100_000),
    "everything lost": lambda f: [lose(path.name)(f) for path in f.iterdir()],
    "a file": a_file_instead,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    folder: RunFolder, damage: Callable[[Path], object]
) -> None:
    folder.save_checkpoint(checkpoint(1))
    folder.save_checkpoint(checkpoint(2))
    damage(folder.checkpoints / "round-00002")
    warnings: list[str] = []
    found = folder.latest_checkpoint(warnings.append)
    assert found is not None
    assert found.server_round == 1
    assert len(warnings) == 1
    assert "round-00002 is damaged" in warnings[0]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_run_whose_every_checkpoint_is_damaged_says_so(
    folder: RunFolder, damage: Callable[[Path], object]
) -> None:
    for server_round in (1, 2):
        folder.save_checkpoint(checkpoint(server_round))
        damage(folder.checkpoints / f"round-{server_round:05d}")
    with pytest.raises(CheckpointError, match="every checkpoint .* is damaged; .*--overwrite"):
        folder.latest_checkpoint(lambda _: None)


@pytest.mark.parametrize(
    "state", [b"[]", b"null", b"{}", b'{"server_round": 1}', b"[" * 100_000, b"x"]
)
def test_sealed_checkpoint_of_another_form_is_damaged_too(folder: RunFolder, state: bytes) -> None:
    folder.save_checkpoint(checkpoint(1))
    inner = folder.checkpoints / "round-00001"
    (inner / "state.json").write_bytes(state)
    seal = json.loads((inner / "seal.json").read_text())
    (inner / "seal.json").write_text(
        json.dumps(seal | {"state": sha256_of_file(inner / "state.json")})
    )
    with pytest.raises(CheckpointError):
        folder.latest_checkpoint(lambda _: None)


@pytest.mark.parametrize(
    "num_bytes", [0, 30, 1000], ids=["tensors", "tensors, cut", "tensors, late"]
)
def test_full_disk_while_a_checkpoint_is_saved_leaves_the_earlier_ones(
    folder: RunFolder, num_bytes: int
) -> None:
    folder.save_checkpoint(checkpoint(1))
    with full_disk(num_bytes), pytest.raises(StorageError, match="cannot write .*round-00002: "):
        folder.save_checkpoint(checkpoint(2, num_values=1000))
    assert [path.name for path in folder.checkpoints.iterdir()] == ["round-00001"]
    found = folder.latest_checkpoint(pytest.fail)
    assert found is not None
    assert found.server_round == 1


SAVE_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
import numpy as np
from fedpeat.core.run_folder import Checkpoint, RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.create()
for i in count(int(sys.argv[2])):
    arrays = {"w": np.full(50_000, i)}
    folder.save_checkpoint(Checkpoint(i, arrays, {"i": i}))
    folder.write_metrics([{"server_round": i, "loss": float("nan")}] * 1000)
    print(i, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_folder_to_go_on_from(tmp_path: Path) -> None:
    rng, folder, start = np.random.default_rng(0), RunFolder(tmp_path / "run"), 1
    for _ in range(10):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(folder.path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        newest = folder.latest_checkpoint(pytest.fail)
        assert newest is not None
        assert newest.server_round >= start
        assert newest.state == {"i": newest.server_round}
        np.testing.assert_array_equal(newest.arrays["w"], np.full(50_000, newest.server_round))
        lines = [strict(li) for li in (folder.path / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 1000
        assert lines[0] == lines[-1]
        start = newest.server_round + 1


# --- the lock, and what is kept -----------------------------------------------------------------


def test_folder_in_use_by_another_process_is_refused_until_that_ends(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from fedpeat.core.run_folder import RunFolder; "
        "folder = RunFolder(Path(sys.argv[1])); folder.create(); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StorageError, match="run is in use by another process"):
            RunFolder(tmp_path / "run").create()
        process.kill()
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.close()


def test_closing_gives_the_lock_back(folder: RunFolder) -> None:
    with pytest.raises(StorageError, match="in use"):
        RunFolder(folder.path).create()
    folder.close()
    again = RunFolder(folder.path)
    again.create()
    again.close()


def test_run_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="cannot write .*/run: "):
        RunFolder(tmp_path / "run").create()


def test_folder_holds_a_run_from_its_first_checkpoint_on(folder: RunFolder) -> None:
    (folder.path / "config.yaml").write_text("")
    assert not folder.has_run()
    folder.save_checkpoint(checkpoint(1))
    assert folder.has_run()


def test_folder_with_a_result_holds_a_run(folder: RunFolder) -> None:
    (folder.path / "summary.json").write_text("{}")
    assert folder.has_run()


def test_checkpoint_of_a_run_inside_counts(folder: RunFolder) -> None:
    inner = RunFolder(folder.path / "clients" / "site-1")
    inner.create()
    inner.save_checkpoint(checkpoint(1))
    inner.close()
    assert folder.has_run()


def fill(folder: RunFolder) -> None:
    for name in ("emulator", "adapter", "tensorboard", "full_tuned", "clients/site-1"):
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "file").write_text("")
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "log.txt"):
        (folder.path / name).write_text("")
    folder.save_checkpoint(checkpoint(1))


def test_clearing_removes_all_of_a_run_and_nothing_else(folder: RunFolder) -> None:
    fill(folder)
    (folder.path / "notes.txt").write_text("mine")
    folder.clear()
    assert not folder.has_run()
    left = sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*"))
    assert left == [".lock", "checkpoints", "notes.txt"]


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "config.yaml", "log.txt"])
def test_folder_with_files_of_somebody_else_is_refused_before_one_is_lost(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "project" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"project must be a new folder .* got {name} of no run"):
        RunFolder(tmp_path / "project").create()
    assert [path.name for path in (tmp_path / "project").iterdir()] == [name]


def test_folder_of_a_run_that_was_copied_without_its_hidden_files_is_still_a_run(
    folder: RunFolder,
) -> None:
    fill(folder)
    folder.close()
    (folder.path / ".lock").unlink()
    folder.create()
    assert folder.has_run()


def test_folder_with_unrelated_files_can_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    folder.create()
    folder.close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- starting anew ------------------------------------------------------------------------------


def contents(folder: RunFolder) -> dict[str, bytes]:
    files = (path for path in folder.path.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}


def test_run_that_was_set_aside_comes_back_where_the_new_one_does_not_begin(
    folder: RunFolder,
) -> None:
    fill(folder)
    before = contents(folder)
    folder.set_aside()
    assert not folder.has_run()
    (folder.path / "config.yaml").write_text("of the new run")
    folder.settle()
    assert contents(folder) == before


def test_run_that_was_set_aside_is_given_up_at_the_new_ones_first_checkpoint(
    folder: RunFolder,
) -> None:
    fill(folder)
    folder.set_aside()
    folder.save_checkpoint(checkpoint(7))
    names = ["seal.json", "state.json", "tensors.safetensors"]
    assert sorted(contents(folder)) == [f"checkpoints/round-00007/{name}" for name in names]


@pytest.mark.parametrize("step", ["set_aside", "settle"])
@pytest.mark.parametrize("num_renames", range(12))
def test_a_kill_while_a_run_is_set_aside_or_brought_back_loses_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, step: str, num_renames: int
) -> None:
    fill(folder)
    before = contents(folder)
    if step == "settle":
        folder.set_aside()
        (folder.path / "log.txt").write_text("of the new run")
    rename, left = Path.rename, num_renames

    def rename_until_killed(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_until_killed)
        with pytest.raises(KeyboardInterrupt):
            getattr(folder, step)()
    folder.close()
    folder.create()
    assert contents(folder) == before


def test_discarding_removes_the_folder_too(folder: RunFolder) -> None:
    fill(folder)
    folder.discard()
    assert not folder.path.exists()


def test_discarding_keeps_a_folder_with_files_of_somebody_else(folder: RunFolder) -> None:
    fill(folder)
    (folder.path / "notes.txt").write_text("mine")
    folder.discard()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
